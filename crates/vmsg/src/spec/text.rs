// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Values that are texts on the command line, and may be numbers, switches or lists elsewhere.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{DeserializeSeed, Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A value, or `off`: there is to be none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Setting<T> {
    /// None.
    Off,
    /// This one.
    To(T),
}

impl<T> Setting<T> {
    /// As an option.
    pub fn to(&self) -> Option<&T> {
        match self {
            Self::Off => None,
            Self::To(value) => Some(value),
        }
    }
}

impl<T: FromStr> FromStr for Setting<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        match text {
            "off" => Ok(Self::Off),
            text => text.parse().map(Self::To),
        }
    }
}

impl<T: fmt::Display> fmt::Display for Setting<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::To(value) => value.fmt(f),
        }
    }
}

impl<T: fmt::Display> Serialize for Setting<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Setting<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Text(PhantomData))
    }
}

/// Reads one value from its text; a number stands for its digits, `true` and `false` for `on` and `off`.
pub(super) fn one<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    deserializer.deserialize_any(Text(PhantomData)).map(Some)
}

/// Reads a list of such values; one value alone is a list of one.
pub(super) fn many<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    deserializer.deserialize_any(Texts(PhantomData))
}

/// Reads one value whose parts may be a list: with colons between them they are its text.
pub(super) fn parts<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    let parts: Vec<String> = many(deserializer)?;
    parts.join(":").parse().map(Some).map_err(D::Error::custom)
}

/// Writes a value as its text.
pub(super) fn write_one<S: Serializer, T: fmt::Display>(
    value: &Option<T>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.collect_str(value),
        None => serializer.serialize_none(),
    }
}

/// Writes a list of values as their texts.
pub(super) fn write_many<S: Serializer, T: fmt::Display>(
    values: &[T],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(ToString::to_string))
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
