// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tables of a description and what stands in them, each with its place.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;

use toml::Spanned;
use toml::de::{DeTable, DeValue};
use vmsg_bus::keyval;

use super::source::{Mistakes, Span};

/// Bytes of a string: an argument of a process may not have more.
const LONGEST: usize = 128 << 10;

/// Tables of a description: more than a switch has ports, with a device for each.
const MOST: usize = 8192;

/// Keys of a table.
const MOST_KEYS: usize = 128;

/// Items of a list: the rules of a switch are the most of anything.
const MOST_ITEMS: usize = 4096;

/// What `${KEY}` stands for.
pub(super) struct Variables<'a> {
    set: HashMap<&'a str, &'a str>,
    /// Those of `set` that were asked for.
    used: BTreeSet<String>,
    environment: &'a dyn Fn(&str) -> Option<String>,
}

impl<'a> Variables<'a> {
    /// `set` comes first, then `environment`.
    pub(super) fn new(
        set: &'a [(String, String)],
        environment: &'a dyn Fn(&str) -> Option<String>,
    ) -> Self {
        let set = set
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()));
        Self {
            set: set.collect(),
            used: BTreeSet::new(),
            environment,
        }
    }

    /// Replaces each `${KEY}` in `text`; `$$` is a `$`.
    fn expand(&mut self, text: &str, span: &Span, mistakes: &mut Mistakes) -> Value {
        let mut out = String::new();
        let mut is_whole = true;
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            out.push_str(&rest[..at]);
            let after = &rest[at + 1..];
            if let Some(after) = after.strip_prefix('$') {
                out.push('$');
                rest = after;
            } else if let Some(named) = after.strip_prefix('{') {
                let Some((key, after)) = named.split_once('}') else {
                    mistakes.error(span.clone(), "a `${` has no `}`; `$$` stands for a `$`");
                    return Value::Unset;
                };
                match self.get(key) {
                    // What is too long is told below.
                    Some(value) if out.len() <= LONGEST => out.push_str(&value),
                    Some(_) => {}
                    None => {
                        is_whole = false;
                        let message = format!(
                            "${{{key}}} is not set; give --set {key}=…, or set it in the environment"
                        );
                        mistakes.error(span.clone(), message);
                    }
                }
                rest = after;
            } else {
                out.push('$');
                rest = after;
            }
        }
        out.push_str(rest);
        if out.contains('\0') {
            mistakes.error(
                span.clone(),
                "neither a path nor an argument can have a NUL",
            );
            return Value::Unset;
        }
        if out.len() > LONGEST {
            mistakes.error(
                span.clone(),
                format!("a string of {} bytes; {LONGEST} are possible", out.len()),
            );
            return Value::Unset;
        }
        if is_whole {
            Value::Text(out)
        } else {
            Value::Unset
        }
    }

    fn get(&mut self, key: &str) -> Option<String> {
        if let Some(value) = self.set.get(key) {
            self.used.insert(key.to_owned());
            return Some((*value).to_owned());
        }
        (self.environment)(key)
    }

    /// Those that were set for nothing.
    pub(super) fn unused(&self) -> Vec<&str> {
        let mut keys: Vec<&str> = self.set.keys().copied().collect();
        keys.retain(|key| !self.used.contains(*key));
        keys.sort_unstable();
        keys
    }
}

/// A value, with variables replaced.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    /// As it was written, decimal or `0x…`; separators are gone.
    Number(String),
    Flag(bool),
    List(Vec<(Value, Span)>),
    Table,
    /// A point in time.
    Other,
    /// It cannot be known, and that was told.
    Unset,
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Number(_) => "a number",
            Self::Flag(_) => "a boolean",
            Self::List(_) => "a list",
            Self::Table => "a table",
            Self::Other => "a time",
            Self::Unset => "nothing",
        }
    }

    /// As `vmsg`'s command line has it, without a key.
    fn word(&self) -> Option<String> {
        match self {
            Self::Text(text) | Self::Number(text) => Some(text.clone()),
            Self::Flag(true) => Some("on".to_owned()),
            Self::Flag(false) => Some("off".to_owned()),
            Self::List(_) | Self::Table | Self::Other | Self::Unset => None,
        }
    }
}

/// A key with its value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) key_span: Span,
    pub(super) value: Value,
    pub(super) span: Span,
}

/// A table such as `[device.net0]`.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// `device`.
    pub(super) kind: String,
    /// `net0`; empty for a table that there is one of.
    pub(super) name: String,
    /// Where its name stands.
    pub(super) span: Span,
    /// In the order of the text.
    pub(super) entries: Vec<Entry>,
}

/// All tables of a description, in the order of the text.
#[derive(Clone, Debug, Default)]
pub(super) struct Tables {
    pub(super) version: Option<Entry>,
    pub(super) all: Vec<Table>,
}

/// Kinds of tables, and whether there are several with names.
const KINDS: [(&str, bool); 8] = [
    ("host", false),
    ("bus", true),
    ("device", true),
    ("switch", true),
    ("port", true),
    ("uplink", true),
    ("guest", true),
    ("program", true),
];

impl Tables {
    /// Reads `text`. What is not understood is a mistake, and left out.
    pub(super) fn read(text: &str, variables: &mut Variables<'_>, mistakes: &mut Mistakes) -> Self {
        let (root, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            mistakes.error(error.span(), error.message());
        }
        let mut tables = Self::default();
        let known = || {
            let names: Vec<&str> = KINDS.iter().map(|(kind, _)| *kind).collect();
            format!("known: `version`, `{}`", names.join("`, `"))
        };
        for (key, value) in root.get_ref() {
            let kind: &str = key.get_ref();
            if kind == "version" {
                tables.version = Some(entry(key, value, variables, mistakes));
                continue;
            }
            let Some((_, named)) = KINDS.iter().find(|(known, _)| *known == kind) else {
                let near = nearest(kind, KINDS.iter().map(|(kind, _)| *kind));
                mistakes.error(
                    key.span(),
                    format!("unknown key `{kind}`, {}{near}", known()),
                );
                continue;
            };
            let Some(inner) = value.get_ref().as_table() else {
                let form = if *named {
                    format!("[{kind}.NAME]")
                } else {
                    format!("[{kind}]")
                };
                mistakes.error(key.span(), format!("`{kind}` is a table: {form}"));
                continue;
            };
            if !named {
                tables
                    .all
                    .push(table(kind, "", key.span(), inner, variables, mistakes));
                continue;
            }
            for (name, value) in inner {
                let name_span = name.span();
                let name: &str = name.get_ref();
                match value.get_ref().as_table() {
                    Some(inner) => {
                        tables.all.push(table(kind, name, name_span, inner, variables, mistakes));
                    }
                    None => mistakes.error(
                        name_span,
                        format!("a {kind} has a name, and its keys are in a table of its own: [{kind}.NAME]"),
                    ),
                }
            }
        }
        tables.all.sort_by_key(|table| table.span.start);
        if let Some(table) = tables.all.get(MOST) {
            mistakes.error(
                table.span.clone(),
                format!("there are {} tables; {MOST} are possible", tables.all.len()),
            );
            tables.all.truncate(MOST);
        }
        tables
    }

    /// Those of one kind.
    pub(super) fn of<'t>(&'t self, kind: &'t str) -> impl Iterator<Item = &'t Table> {
        self.all.iter().filter(move |table| table.kind == kind)
    }

    pub(super) fn find(&self, kind: &str, name: &str) -> Option<&Table> {
        self.all
            .iter()
            .find(|table| table.kind == kind && table.name == name)
    }
}

fn table(
    kind: &str,
    name: &str,
    span: Span,
    inner: &DeTable<'_>,
    variables: &mut Variables<'_>,
    mistakes: &mut Mistakes,
) -> Table {
    let mut entries: Vec<Entry> = inner
        .iter()
        .map(|(key, value)| entry(key, value, variables, mistakes))
        .collect();
    entries.sort_by_key(|entry| entry.key_span.start);
    if let Some(entry) = entries.get(MOST_KEYS) {
        mistakes.error(
            entry.key_span.clone(),
            format!(
                "there are {} keys in one table; {MOST_KEYS} are possible",
                entries.len()
            ),
        );
        entries.truncate(MOST_KEYS);
    }
    Table {
        kind: kind.to_owned(),
        name: name.to_owned(),
        span,
        entries,
    }
}

fn entry(
    key: &Spanned<std::borrow::Cow<'_, str>>,
    value: &Spanned<DeValue<'_>>,
    variables: &mut Variables<'_>,
    mistakes: &mut Mistakes,
) -> Entry {
    Entry {
        key: key.get_ref().clone().into_owned(),
        key_span: key.span(),
        value: convert(value, variables, mistakes),
        span: value.span(),
    }
}

fn convert(
    value: &Spanned<DeValue<'_>>,
    variables: &mut Variables<'_>,
    mistakes: &mut Mistakes,
) -> Value {
    match value.get_ref() {
        DeValue::String(text) => variables.expand(text, &value.span(), mistakes),
        DeValue::Integer(number) => {
            let (digits, radix) = (number.as_str(), number.radix());
            // The command line knows decimal and hexadecimal numbers.
            Value::Number(match (radix, i128::from_str_radix(digits, radix)) {
                (2 | 8, Ok(number)) => number.to_string(),
                _ => number.to_string(),
            })
        }
        DeValue::Float(number) => Value::Number(number.to_string()),
        DeValue::Boolean(flag) => Value::Flag(*flag),
        DeValue::Datetime(_) => Value::Other,
        DeValue::Array(list) if list.len() > MOST_ITEMS => {
            mistakes.error(
                value.span(),
                format!(
                    "there are {} items in one list; {MOST_ITEMS} are possible",
                    list.len()
                ),
            );
            Value::Unset
        }
        DeValue::Array(list) => Value::List(
            list.iter()
                .map(|item| (convert(item, variables, mistakes), item.span()))
                .collect(),
        ),
        DeValue::Table(_) => Value::Table,
    }
}

impl Table {
    /// `[device.net0]`.
    pub(super) fn title(&self) -> String {
        if self.name.is_empty() {
            format!("[{}]", self.kind)
        } else {
            format!("[{}.{}]", self.kind, self.name)
        }
    }

    /// The bytes from its name to its last value.
    pub(super) fn extent(&self) -> Span {
        let ends = self.entries.iter().map(|entry| entry.span.end);
        self.span.start..ends.max().unwrap_or(0).max(self.span.end)
    }

    pub(super) fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    /// The value of `key` as text, whatever it is.
    pub(super) fn text(&self, key: &str) -> Option<String> {
        self.entry(key).and_then(|entry| entry.value.word())
    }

    /// Where `key`'s value stands, or the table's name.
    pub(super) fn place(&self, key: &str) -> Span {
        self.entry(key)
            .map_or_else(|| self.span.clone(), |entry| entry.span.clone())
    }

    /// Finds keys that are not among `known`.
    pub(super) fn check_keys(&self, known: &[&str], mistakes: &mut Mistakes) {
        for entry in &self.entries {
            if !known.contains(&entry.key.as_str()) {
                let near = nearest(&entry.key, known.iter().copied());
                mistakes.error(
                    entry.key_span.clone(),
                    format!(
                        "unknown key `{}`, known: `{}`{near}",
                        entry.key,
                        known.join("`, `")
                    ),
                );
            }
        }
    }

    fn wrong(&self, entry: &Entry, wanted: &str, mistakes: &mut Mistakes) {
        if entry.value == Value::Unset {
            return;
        }
        mistakes.error(
            entry.span.clone(),
            format!(
                "`{}` must be {wanted}, not {}",
                entry.key,
                entry.value.kind()
            ),
        );
    }

    pub(super) fn string(&self, key: &str, mistakes: &mut Mistakes) -> Option<(String, Span)> {
        let entry = self.entry(key)?;
        match &entry.value {
            Value::Text(text) => Some((text.clone(), entry.span.clone())),
            _ => {
                self.wrong(entry, "a string", mistakes);
                None
            }
        }
    }

    pub(super) fn number(&self, key: &str, mistakes: &mut Mistakes) -> Option<u64> {
        let entry = self.entry(key)?;
        let number = match &entry.value {
            Value::Number(text) => match text.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16).ok(),
                None => text.parse().ok(),
            },
            _ => None,
        };
        if number.is_none() {
            self.wrong(entry, "a whole number that is not negative", mistakes);
        }
        number
    }

    pub(super) fn flag(&self, key: &str, mistakes: &mut Mistakes) -> Option<bool> {
        let entry = self.entry(key)?;
        match &entry.value {
            Value::Flag(flag) => Some(*flag),
            _ => {
                self.wrong(entry, "true or false", mistakes);
                None
            }
        }
    }

    /// A list of strings; with `or_one` a single string, too.
    pub(super) fn strings(
        &self,
        key: &str,
        or_one: bool,
        mistakes: &mut Mistakes,
    ) -> Option<Vec<(String, Span)>> {
        let entry = self.entry(key)?;
        let wanted = if or_one {
            "a string or a list of strings"
        } else {
            "a list of strings"
        };
        match &entry.value {
            Value::Text(text) if or_one => Some(vec![(text.clone(), entry.span.clone())]),
            Value::List(items) => {
                let mut list = Vec::new();
                for (item, span) in items {
                    match item {
                        Value::Text(text) => list.push((text.clone(), span.clone())),
                        Value::Unset => {}
                        other => mistakes.error(
                            span.clone(),
                            format!("`{key}` must be {wanted}, and this is {}", other.kind()),
                        ),
                    }
                }
                Some(list)
            }
            _ => {
                self.wrong(entry, wanted, mistakes);
                None
            }
        }
    }

    /// One of several words.
    pub(super) fn choice<T: Copy>(
        &self,
        key: &str,
        words: &[(&str, T)],
        mistakes: &mut Mistakes,
    ) -> Option<T> {
        let (text, span) = self.string(key, mistakes)?;
        let found = words.iter().find(|(word, _)| *word == text);
        if found.is_none() {
            let known: Vec<String> = words
                .iter()
                .map(|(word, _)| format!("\"{word}\""))
                .collect();
            mistakes.error(
                span,
                format!(
                    "`{key}` must be one of {}, not \"{text}\"",
                    known.join(", ")
                ),
            );
        }
        found.map(|(_, value)| *value)
    }

    /// The table as an argument of the command line: `first`, then what is in `entries`, each key with its value, a list
    /// as a key that is repeated.
    pub(super) fn argument<'e>(
        &self,
        first: &str,
        entries: impl IntoIterator<Item = &'e Entry>,
        mistakes: &mut Mistakes,
    ) -> String {
        let mut text = first.to_owned();
        for entry in entries {
            let values = match &entry.value {
                Value::List(items) => items.iter().map(|(item, span)| (item, span)).collect(),
                value => vec![(value, &entry.span)],
            };
            for (value, span) in values {
                match value.word() {
                    Some(word) => {
                        let comma = if text.is_empty() { "" } else { "," };
                        let key = keyval::escape(&entry.key);
                        let _ = write!(text, "{comma}{key}={}", keyval::escape(&word));
                    }
                    None if *value == Value::Unset => {}
                    None => mistakes.error(
                        span.clone(),
                        format!("`{}` cannot be {}", entry.key, value.kind()),
                    ),
                }
            }
        }
        text
    }
}

/// `; did you mean …?`, if something known is near.
pub(super) fn nearest<'k>(got: &str, known: impl Iterator<Item = &'k str>) -> String {
    keyval::meant(got, known)
        .map(|known| format!("; did you mean `{known}`?"))
        .unwrap_or_default()
}
