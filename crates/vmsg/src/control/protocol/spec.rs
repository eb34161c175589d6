// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Specifications in requests: the text that the command line has, or an object as a table of TOML.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, Visitor};
use serde::ser::{Error as _, Serializer};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use vmsg_bus::keyval;

use crate::spec::{DeviceSpec, PortSpec, UplinkSpec, typed};

/// A specification that was given in either form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Given<T>(pub(crate) T);

/// What can be read from an object.
pub(crate) trait Table: DeserializeOwned {
    /// Reads it.
    fn read(table: Map<String, Value>) -> Result<Self, serde_json::Error>;
}

impl Table for DeviceSpec {
    fn read(mut table: Map<String, Value>) -> Result<Self, serde_json::Error> {
        match table.remove("type") {
            Some(Value::String(kind)) => typed(&kind, Value::Object(table)),
            _ => Err(serde_json::Error::missing_field("type")),
        }
    }
}

impl Table for PortSpec {
    fn read(table: Map<String, Value>) -> Result<Self, serde_json::Error> {
        serde_json::from_value(Value::Object(table))
    }
}

impl Table for UplinkSpec {
    fn read(table: Map<String, Value>) -> Result<Self, serde_json::Error> {
        serde_json::from_value(Value::Object(table))
    }
}

impl<T: Serialize> Serialize for Given<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = keyval::to_string(&self.0).map_err(S::Error::custom)?;
        serializer.serialize_str(&text)
    }
}

impl<'de, T: Table> Deserialize<'de> for Given<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Either(PhantomData)).map(Self)
    }
}

struct Either<T>(PhantomData<T>);

impl<'de, T: Table> Visitor<'de> for Either<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a specification as the command line has it, or an object")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        keyval::from_str(text).map_err(|error| E::custom(format!("{text}: {error}")))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        let table = Map::deserialize(MapAccessDeserializer::new(map))?;
        T::read(table).map_err(A::Error::custom)
    }
}
