// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Values that are texts on the command line, and may be numbers, switches or lists elsewhere.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, SeqAccess, Visitor};

/// Reads one value from its text; a number stands for its digits, `true` and `false` for `on` and `off`.
pub(super) fn one<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    deserializer.deserialize_any(Text(PhantomData))
}

/// Reads a list of such values; one value alone is a list of one.
pub(super) fn many<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    deserializer.deserialize_any(Texts(PhantomData))
}

struct Text<T>(PhantomData<T>);

fn parse<T: FromStr<Err: fmt::Display>, E: Error>(text: &str) -> Result<T, E> {
    text.parse().map_err(E::custom)
}

macro_rules! texts {
    ($wrap:expr) => {
        fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
            parse(if value { "on" } else { "off" }).map($wrap)
        }

        fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
            parse(&value.to_string()).map($wrap)
        }

        fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
            parse(&value.to_string()).map($wrap)
        }

        fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
            parse(value).map($wrap)
        }
    };
}

impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    texts!(|value| value);
}

impl<'de, T: FromStr<Err: fmt::Display>> DeserializeSeed<'de> for Text<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_any(self)
    }
}

struct Texts<T>(PhantomData<T>);

impl<'de, T: FromStr<Err: fmt::Display>> Visitor<'de> for Texts<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, or a list of texts")
    }

    texts!(|value| vec![value]);

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(Text(PhantomData))? {
            values.push(value);
        }
        Ok(values)
    }
}
