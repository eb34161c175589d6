// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes specifications: the reverse of [`from_str`](super::from_str).

use serde::Serialize;
use serde::ser::{
    self, Impossible, SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant,
    SerializeTuple, SerializeTupleStruct, Serializer,
};
use std::fmt;

use super::{Error, escape};

/// Writes `value` so that [`from_str`](super::from_str) reads the same out of it. Values that are `None`, and empty lists, are left
/// out.
///
/// ```
/// #[derive(serde::Serialize)]
/// #[serde(rename_all = "kebab-case")]
/// enum Device {
///     Disk { path: &'static str, on: bool, tag: Vec<u8> },
/// }
/// let disk = Device::Disk { path: "a,b.img", on: true, tag: vec![1, 2] };
/// assert_eq!(vmsg_bus::keyval::to_string(&disk).unwrap(), "disk,path=a,,b.img,on=on,tag=1,tag=2");
/// ```
///
/// # Errors
///
/// If there are settings inside settings, or lists inside lists, which one line cannot have.
pub fn to_string<T: Serialize + ?Sized>(value: &T) -> Result<String, Error> {
    let (name, entries) = match value.serialize(Writer)? {
        Node::Table { name, entries } => (name.map(str::to_owned), entries),
        Node::Values(mut values) => match (values.pop(), values.is_empty()) {
            (None, _) => (None, Vec::new()),
            (Some(value), true) if !value.is_empty() && !value.contains('=') => {
                (Some(value), Vec::new())
            }
            _ => return Err(Error::new("this cannot be written without a key")),
        },
    };
    let mut items: Vec<String> = Vec::new();
    items.extend(name.map(|name| escape(&name).into_owned()));
    for (key, values) in entries {
        let values = values.iter();
        items.extend(values.map(|value| format!("{key}={}", escape(value))));
    }
    Ok(items.join(","))
}

/// What a value becomes.
enum Node {
    /// What stands behind one key, which is repeated.
    Values(Vec<String>),
    /// Keys, perhaps behind a name.
    Table {
        name: Option<&'static str>,
        entries: Vec<(String, Vec<String>)>,
    },
}

fn nested<T>() -> Result<T, Error> {
    Err(Error::new(
        "settings inside settings cannot be written on one line",
    ))
}

impl ser::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(message.to_string())
    }
}

struct Writer;

/// A table whose keys are coming.
#[derive(Default)]
struct Table {
    name: Option<&'static str>,
    /// The key whose value comes next, in a map.
    key: Option<String>,
    entries: Vec<(String, Vec<String>)>,
}

impl Table {
    fn entry<T: Serialize + ?Sized>(&mut self, key: String, value: &T) -> Result<(), Error> {
        if key.is_empty() || key.contains(['=', ',']) {
            return Err(Error::new(format!("`{key}` cannot be a key")));
        }
        match value.serialize(Writer)? {
            Node::Values(values) => self.entries.push((key, values)),
            Node::Table { .. } => return nested(),
        }
        Ok(())
    }

    fn finish(self) -> Node {
        Node::Table {
            name: self.name,
            entries: self.entries,
        }
    }
}

/// A list whose items are coming.
struct List(Vec<String>);

impl List {
    fn push<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        match value.serialize(Writer)? {
            Node::Values(mut values) if values.len() == 1 => self.0.append(&mut values),
            _ => return nested(),
        }
        Ok(())
    }
}

macro_rules! plain {
    ($($method:ident $type:ty),*) => {$(
        fn $method(self, value: $type) -> Result<Node, Error> {
            Ok(Node::Values(vec![value.to_string()]))
        }
    )*};
}

impl Serializer for Writer {
    type Ok = Node;
    type Error = Error;
    type SerializeSeq = List;
    type SerializeTuple = List;
    type SerializeTupleStruct = List;
    type SerializeTupleVariant = Impossible<Node, Error>;
    type SerializeMap = Table;
    type SerializeStruct = Table;
    type SerializeStructVariant = Table;

    plain! {
        serialize_i8 i8, serialize_i16 i16, serialize_i32 i32, serialize_i64 i64, serialize_u8 u8, serialize_u16 u16,
        serialize_u32 u32, serialize_u64 u64, serialize_f32 f32, serialize_f64 f64, serialize_char char, serialize_str &str
    }

    fn serialize_bool(self, value: bool) -> Result<Node, Error> {
        self.serialize_str(if value { "on" } else { "off" })
    }

    fn serialize_bytes(self, _: &[u8]) -> Result<Node, Error> {
        Err(Error::new("bytes cannot be written as text"))
    }

    fn serialize_none(self) -> Result<Node, Error> {
        Ok(Node::Values(Vec::new()))
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Node, Error> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<Node, Error> {
        self.serialize_none()
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<Node, Error> {
        self.serialize_none()
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
    ) -> Result<Node, Error> {
        self.serialize_str(variant)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<Node, Error> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<Node, Error> {
        match value.serialize(self)? {
            Node::Table {
                name: None,
                entries,
            } => Ok(Node::Table {
                name: Some(variant),
                entries,
            }),
            _ => nested(),
        }
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<List, Error> {
        Ok(List(Vec::new()))
    }

    fn serialize_tuple(self, _: usize) -> Result<List, Error> {
        Ok(List(Vec::new()))
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<List, Error> {
        Ok(List(Vec::new()))
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleVariant, Error> {
        nested()
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Table, Error> {
        Ok(Table::default())
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Table, Error> {
        Ok(Table::default())
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Table, Error> {
        Ok(Table {
            name: Some(variant),
            ..Table::default()
        })
    }
}

impl SerializeSeq for List {
    type Ok = Node;
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.push(value)
    }

    fn end(self) -> Result<Node, Error> {
        Ok(Node::Values(self.0))
    }
}

impl SerializeTuple for List {
    type Ok = Node;
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.push(value)
    }

    fn end(self) -> Result<Node, Error> {
        Ok(Node::Values(self.0))
    }
}

impl SerializeTupleStruct for List {
    type Ok = Node;
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.push(value)
    }

    fn end(self) -> Result<Node, Error> {
        Ok(Node::Values(self.0))
    }
}

impl SerializeMap for Table {
    type Ok = Node;
    type Error = Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Error> {
        match key.serialize(Writer)? {
            Node::Values(mut values) if values.len() == 1 => self.key = values.pop(),
            _ => return Err(Error::new("a key must be text")),
        }
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        let key = self.key.take().expect("a map serializes the key first");
        self.entry(key, value)
    }

    fn end(self) -> Result<Node, Error> {
        Ok(self.finish())
    }
}

impl SerializeStruct for Table {
    type Ok = Node;
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        key: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        self.entry(key.to_owned(), value)
    }

    fn end(self) -> Result<Node, Error> {
        Ok(self.finish())
    }
}

impl SerializeStructVariant for Table {
    type Ok = Node;
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        key: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        self.entry(key.to_owned(), value)
    }

    fn end(self) -> Result<Node, Error> {
        Ok(self.finish())
    }
}

#[cfg(test)]
#[path = "write_test.rs"]
mod tests;
