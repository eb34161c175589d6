// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The values of one key as a serde deserializer.

use super::{Error, unknown};
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, SeqAccess, VariantAccess, Visitor,
};

/// One occurrence of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Item {
    /// `key=text`
    Text(String),
    /// `key` alone
    Flag,
}

/// Everything that was given for one key; at least one item.
pub(super) struct Values {
    key: String,
    items: Vec<Item>,
}

impl Values {
    pub(super) fn new(key: String, items: Vec<Item>) -> Self {
        Self { key, items }
    }

    /// The key and the value as written, for messages.
    pub(super) fn place(&self) -> (String, String) {
        let shown = match self.items.first() {
            Some(Item::Text(text)) => text.clone(),
            _ => "on".to_owned(),
        };
        (self.key.clone(), shown)
    }

    fn one(&self) -> Result<&Item, Error> {
        match self.items.as_slice() {
            [item] => Ok(item),
            _ => Err(Error(format!("`{}` is given more than once", self.key))),
        }
    }

    fn text(&self) -> Result<&str, Error> {
        match self.one()? {
            Item::Text(text) => Ok(text),
            Item::Flag => Err(Error(format!("`{0}` needs a value: `{0}=…`", self.key))),
        }
    }

    fn bool(&self) -> Result<bool, Error> {
        match self.one()? {
            Item::Flag => Ok(true),
            Item::Text(text) => boolean(text)
                .ok_or_else(|| Error::new(format!("expected `on` or `off`, not `{text}`"))),
        }
    }

    fn unsigned(&self, max: u64) -> Result<u64, Error> {
        let text = self.text()?;
        let value = number(text).ok_or_else(|| {
            Error::new(format!(
                "expected a number such as 264, 0x40, 64K, 2M or 1G, not `{text}`"
            ))
        })?;
        if value > max {
            return Err(Error::new(format!(
                "{text} is too large, the most is {max}"
            )));
        }
        Ok(value)
    }

    fn signed(&self, min: i64, max: i64) -> Result<i64, Error> {
        let text = self.text()?;
        let (negative, digits) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let magnitude =
            number(digits).ok_or_else(|| Error::new(format!("expected a number, not `{text}`")))?;
        let value = if negative {
            -i128::from(magnitude)
        } else {
            i128::from(magnitude)
        };
        match i64::try_from(value) {
            Ok(value) if (min..=max).contains(&value) => Ok(value),
            _ => Err(Error::new(format!(
                "{text} is out of range, {min} to {max}"
            ))),
        }
    }

    fn float(&self) -> Result<f64, Error> {
        let text = self.text()?;
        text.parse()
            .map_err(|_| Error::new(format!("expected a number, not `{text}`")))
    }
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

/// Decimal or `0x…`, with an optional binary suffix.
pub(crate) fn number(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x") {
        // from_str_radix would take a sign.
        return if hex.starts_with('+') {
            None
        } else {
            u64::from_str_radix(hex, 16).ok()
        };
    }
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

macro_rules! unsigned {
    ($($method:ident $visit:ident $t:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.visit_u64(self.unsigned(u64::from(<$t>::MAX))?)
        }
    )*};
}

macro_rules! signed {
    ($($method:ident $t:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.visit_i64(self.signed(i64::from(<$t>::MIN), i64::from(<$t>::MAX))?)
        }
    )*};
}

impl<'de> Deserializer<'de> for Values {
    type Error = Error;

    unsigned!(deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32, deserialize_u64 visit_u64 u64);
    signed!(deserialize_i8 i8, deserialize_i16 i16, deserialize_i32 i32, deserialize_i64 i64);

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.items.len() > 1 {
            return self.deserialize_seq(visitor);
        }
        match self.one()? {
            Item::Flag => visitor.visit_bool(true),
            Item::Text(text) => match (boolean(text), text.parse::<u64>()) {
                (Some(value), _) => visitor.visit_bool(value),
                (None, Ok(value)) => visitor.visit_u64(value),
                (None, Err(_)) => visitor.visit_str(text),
            },
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(self.bool()?)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_f64(self.float()?)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_f64(self.float()?)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text()?)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text()?)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bytes(self.text()?.as_bytes())
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Each {
            key: self.key,
            left: self.items.into_iter(),
        })
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Error> {
        Err(Error::new(
            "settings inside settings cannot be written on one line",
        ))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let text = self.text()?.to_owned();
        if !variants.contains(&text.as_str()) {
            return Err(unknown("value", &text, variants));
        }
        visitor.visit_enum(Word(text))
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }
}

/// The items of a repeated key, one after another.
struct Each {
    key: String,
    left: std::vec::IntoIter<Item>,
}

impl<'de> SeqAccess<'de> for Each {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        let Some(item) = self.left.next() else {
            return Ok(None);
        };
        let values = Values::new(self.key.clone(), vec![item]);
        let (key, shown) = values.place();
        seed.deserialize(values)
            .map(Some)
            .map_err(|e| e.at(&key, &shown))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left.len())
    }
}

/// An enum whose variants are single words.
struct Word(String);

impl<'de> EnumAccess<'de> for Word {
    type Error = Error;
    type Variant = Alone;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Alone), Error> {
        let variant = seed.deserialize(self.0.as_str().into_deserializer())?;
        Ok((variant, Alone))
    }
}

/// What follows a single word: nothing.
struct Alone;

impl Alone {
    fn refuse<T>() -> Result<T, Error> {
        Err(Error::new(
            "this value has settings of its own, which cannot be written here",
        ))
    }
}

impl<'de> VariantAccess<'de> for Alone {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, _seed: S) -> Result<S::Value, Error> {
        Self::refuse()
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, _visitor: V) -> Result<V::Value, Error> {
        Self::refuse()
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Error> {
        Self::refuse()
    }
}
