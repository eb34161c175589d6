// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Specifications in the manner of QEMU: `name,key=value,flag,…`.
//!
//! [`from_str`] reads such a line into any serde type, so that one struct
//! serves the command line, TOML and control messages; [`to_string`] writes it.
//!
//! * Items are separated by commas; `,,` is a comma inside an item. The first
//!   `=` ends the key.
//! * A first item without `=` names the variant of an enum
//!   (`unix,path=b0.sock`), or is the value of a struct's first field. In a
//!   map, or wherever serde does not tell the names of the fields (internally
//!   tagged and flattened types), it becomes the value of `type`.
//! * Any other item without `=` is a flag: the same as `flag=on`.
//! * Booleans are `on` and `off`. Integers are decimal or `0x…` and may end in
//!   `K`, `M`, `G` or `T` (powers of 1024).
//! * A key given more than once fills a `Vec`, and is an error elsewhere.
//! * Unknown keys are refused, naming the known ones, whether or not the type
//!   asks for it.

mod value;
mod write;

use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess,
    VariantAccess, Visitor,
};
use std::borrow::Cow;
use std::fmt;
#[cfg(feature = "ivshmem")]
pub(crate) use value::number;
use value::{Item, Values};
pub use write::to_string;

/// Why a specification was refused, in words for the person who wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Puts the place in front of the message, once.
    fn at(self, key: &str, shown: &str) -> Self {
        if self.0.starts_with('`') {
            self
        } else {
            Self(format!("`{key}={shown}`: {}", self.0))
        }
    }
}

impl de::Error for Error {
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Self(msg.to_string())
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("`{field}=…` is missing"))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self(format!("`{field}` is given more than once"))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        unknown("key", field, expected)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        unknown("value", variant, expected)
    }
}

/// Reads `spec` as a `T`.
///
/// ```
/// #[derive(serde::Deserialize)]
/// #[serde(rename_all = "kebab-case")]
/// struct Disk {
///     path: String,
///     size: u64,
///     #[serde(default)]
///     read_only: bool,
/// }
/// let disk: Disk = vmsg_bus::keyval::from_str("a,,b.img,size=4M,read-only").unwrap();
/// assert_eq!((disk.path.as_str(), disk.size, disk.read_only), ("a,b.img", 4 << 20, true));
/// ```
pub fn from_str<T: DeserializeOwned>(spec: &str) -> Result<T, Error> {
    T::deserialize(Spec::parse(spec)?)
}

/// Takes the item `key=…` out of `spec`; returns its value and the other items.
///
/// # Errors
///
/// If `key` is there more than once, or without a value.
pub fn take(spec: &str, key: &str) -> Result<(Option<String>, String), Error> {
    let mut found = None;
    let mut rest = Vec::new();
    for item in split(spec) {
        match item.split_once('=') {
            Some((name, _)) if name == key && found.is_some() => {
                return Err(Error(format!("`{key}` is given more than once")));
            }
            Some((name, value)) if name == key => found = Some(value.to_owned()),
            None if item == key => {
                return Err(Error(format!("`{key}` needs a value: `{key}=…`")));
            }
            _ => rest.push(escape(&item).into_owned()),
        }
    }
    Ok((found, rest.join(",")))
}

/// `text` with its commas doubled, to be put into a specification.
pub fn escape(text: &str) -> Cow<'_, str> {
    if text.contains(',') {
        Cow::Owned(text.replace(',', ",,"))
    } else {
        Cow::Borrowed(text)
    }
}

/// A whole specification, split but not interpreted.
struct Spec {
    /// The first item, if it has no `=`.
    name: Option<String>,
    /// Every key once, in order of first use, with all its values.
    entries: Vec<(String, Vec<Item>)>,
}

impl Spec {
    fn parse(spec: &str) -> Result<Self, Error> {
        let mut name = None;
        let mut entries: Vec<(String, Vec<Item>)> = Vec::new();
        if spec.is_empty() {
            return Ok(Self { name, entries });
        }
        for (i, item) in split(spec).into_iter().enumerate() {
            let (key, value) = match item.split_once('=') {
                Some(("", _)) => return Err(Error(format!("`{item}` has no key before the `=`"))),
                Some((key, value)) => (key, Item::Text(value.to_owned())),
                None if item.is_empty() => {
                    return Err(Error(format!(
                        "`{spec}` has an empty item (`,,` is a comma)"
                    )));
                }
                None if i == 0 => {
                    name = Some(item);
                    continue;
                }
                None => (item.as_str(), Item::Flag),
            };
            match entries.iter_mut().find(|(k, _)| k == key) {
                Some((_, values)) => values.push(value),
                None => entries.push((key.to_owned(), vec![value])),
            }
        }
        Ok(Self { name, entries })
    }

    /// Gives the unnamed first item the key `key`.
    fn name_first(&mut self, key: &str) -> Result<(), Error> {
        if let Some(name) = self.name.take() {
            if self.entries.iter().any(|(k, _)| k == key) {
                return Err(Error(format!(
                    "`{key}` is given more than once (`{name}` stands for `{key}={name}`)"
                )));
            }
            self.entries
                .insert(0, (key.to_owned(), vec![Item::Text(name)]));
        }
        Ok(())
    }

    /// The only value there is, for types that are not structs.
    fn single(mut self) -> Result<Values, Error> {
        match (self.name.take(), self.entries.first()) {
            (Some(name), None) => Ok(Values::new(String::new(), vec![Item::Text(name)])),
            (_, Some((key, _))) => Err(Error(format!("`{key}` is not expected here"))),
            (None, None) => Err(Error::new("a value is missing")),
        }
    }

    fn check_keys(&self, known: &'static [&'static str]) -> Result<(), Error> {
        match self
            .entries
            .iter()
            .find(|(k, _)| !known.contains(&k.as_str()))
        {
            Some((value, items)) if matches!(items[..], [Item::Flag]) && !is_key(value) => {
                Err(nameless(value, known))
            }
            Some((key, _)) => Err(unknown("key", key, known)),
            None => Ok(()),
        }
    }
}

/// Splits at single commas; two commas are one that belongs to the item.
fn split(spec: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = spec.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(last) = items.last_mut() {
            last.push(c);
        }
    }
    items
}

/// Whether `text` has only what keys have.
fn is_key(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// An item without `=` that cannot be a flag: a value whose key was left out, most likely.
fn nameless(value: &str, known: &[&str]) -> Error {
    let key = ["path", "socket"]
        .into_iter()
        .find(|key| known.contains(key));
    match key {
        Some(key) => Error(format!(
            "`{value}` has no key before it; did you mean `{key}={}`?",
            escape(value)
        )),
        None => unknown("key", value, known),
    }
}

/// What keys are called elsewhere, as in QEMU.
const ELSEWHERE: &[(&str, &str)] = &[
    ("readonly", "ro"),
    ("read-only", "ro"),
    ("file", "path"),
    ("filename", "path"),
    ("num-queues", "queues"),
];

/// The one of `known` that a person may have meant by `got`.
pub fn meant<'k>(got: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let known: Vec<&str> = known.into_iter().collect();
    let near = known.iter().map(|key| (distance(got, key), *key)).min();
    let near = near.filter(|(distance, key)| *distance <= 2 && *distance < key.chars().count());
    let called = |key: &&str| ELSEWHERE.contains(&(got, *key));
    let elsewhere = known.iter().copied().find(called);
    elsewhere.or(near.map(|(_, key)| key))
}

/// «unknown `what`», with all that would have been known and the nearest of it.
fn unknown(what: &str, got: &str, known: &[&str]) -> Error {
    if known.is_empty() {
        return Error(format!("unknown {what} `{got}`: none is expected here"));
    }
    let list: Vec<String> = known.iter().map(|k| format!("`{k}`")).collect();
    let near = meant(got, known.iter().copied())
        .map(|k| format!("; did you mean `{k}`?"))
        .unwrap_or_default();
    Error(format!(
        "unknown {what} `{got}`, known: {}{near}",
        list.join(", ")
    ))
}

/// How many characters have to be added, removed or replaced to make `b` out of `a` (Levenshtein): what a person may have meant.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Hands single values on to [`Values`].
macro_rules! single {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            self.single()?.$method(visitor)
        }
    )*};
}

impl<'de> Deserializer<'de> for Spec {
    type Error = Error;

    single! {
        deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_f32 deserialize_f64
        deserialize_char deserialize_str deserialize_string deserialize_bytes deserialize_byte_buf
        deserialize_seq deserialize_identifier
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_map(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.name_first("type")?;
        visitor.visit_map(Entries::new(self))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        mut self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if let Some(name) = &self.name {
            match fields.first() {
                Some(first) => self.name_first(first)?,
                None => return Err(Error(format!("`{name}` is not expected here"))),
            }
        }
        self.check_keys(fields)?;
        visitor.visit_map(Entries::new(self))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        mut self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Some(name) = self.name.take() else {
            let list: Vec<String> = variants.iter().map(|v| format!("`{v}`")).collect();
            return Err(Error(format!(
                "the first item must be one of {}",
                list.join(", ")
            )));
        };
        if !variants.contains(&name.as_str()) {
            return Err(unknown("name", &name, variants));
        }
        visitor.visit_enum(Variant { name, rest: self })
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.name.is_none() && self.entries.is_empty() {
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.check_keys(&[])?;
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_unit(visitor)
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

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }
}

/// The entries of a specification as a serde map.
struct Entries {
    left: std::vec::IntoIter<(String, Vec<Item>)>,
    next: Option<Values>,
}

impl Entries {
    fn new(spec: Spec) -> Self {
        Self {
            left: spec.entries.into_iter(),
            next: None,
        }
    }
}

impl<'de> MapAccess<'de> for Entries {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((key, values)) = self.left.next() else {
            return Ok(None);
        };
        let found = seed.deserialize(key.as_str().into_deserializer())?;
        self.next = Some(Values::new(key, values));
        Ok(Some(found))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let values = self
            .next
            .take()
            .ok_or_else(|| Error::new("a value was asked for before its key"))?;
        let (key, shown) = values.place();
        seed.deserialize(values).map_err(|e| e.at(&key, &shown))
    }
}

/// An enum: the first item is the variant, the rest its content.
struct Variant {
    name: String,
    rest: Spec,
}

impl<'de> EnumAccess<'de> for Variant {
    type Error = Error;
    type Variant = Spec;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Spec), Error> {
        let variant = seed.deserialize(self.name.as_str().into_deserializer())?;
        Ok((variant, self.rest))
    }
}

impl<'de> VariantAccess<'de> for Spec {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        self.check_keys(&[])
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_struct("", fields, visitor)
    }
}

#[cfg(test)]
#[path = "keyval_test.rs"]
mod tests;
