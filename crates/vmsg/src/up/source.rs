// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A description as text: where things stand in it, and how mistakes are shown.

use std::fmt;
use std::ops::Range;

/// Bytes of a description.
pub(super) type Span = Range<usize>;

/// Characters of a line that are shown around a mistake.
const SHOWN: usize = 160;

/// A description as it was written.
#[derive(Clone, Debug)]
pub(super) struct Source {
    /// The file as the user named it.
    name: String,
    text: String,
}

/// Something that is wrong, or looks like it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mistake {
    /// Where; `None`: in no place of the description.
    pub(super) span: Option<Span>,
    /// What, in words.
    pub(super) message: String,
    /// It can be lived with.
    pub(super) is_warning: bool,
}

/// Characters of a mistake's words.
const LONGEST: usize = 600;

/// Mistakes that are told; whoever has made more has to begin somewhere.
const MOST: usize = 100;

/// All that is wrong with a description.
#[derive(Clone, Debug, Default)]
pub(super) struct Mistakes {
    told: Vec<Mistake>,
    /// There are more.
    are_more: bool,
}

impl Mistakes {
    pub(super) fn error(&mut self, span: impl Into<Option<Span>>, message: impl fmt::Display) {
        self.add(span.into(), message, false);
    }

    pub(super) fn warning(&mut self, span: impl Into<Option<Span>>, message: impl fmt::Display) {
        self.add(span.into(), message, true);
    }

    fn add(&mut self, span: Option<Span>, message: impl fmt::Display, is_warning: bool) {
        let mut message = message.to_string();
        // It may quote what is there, which may be anything.
        message.retain(|c| !c.is_control());
        if let Some((end, _)) = message.char_indices().nth(LONGEST) {
            message.truncate(end);
            message.push('…');
        }
        let mistake = Mistake {
            span,
            message,
            is_warning,
        };
        if self.told.contains(&mistake) {
            return;
        }
        if self.told.len() < MOST {
            self.told.push(mistake);
        } else if !is_warning {
            self.are_more = true;
        }
    }

    /// True if no more will be told: then there is no use in looking for them.
    pub(super) fn are_too_many(&self) -> bool {
        self.are_more
    }

    /// True if there is something that cannot be lived with.
    pub(super) fn are_fatal(&self) -> bool {
        self.are_more || self.told.iter().any(|mistake| !mistake.is_warning)
    }

    /// True if something in these bytes cannot be lived with.
    pub(super) fn are_fatal_in(&self, span: &Span) -> bool {
        self.are_more
            || self.told.iter().any(|mistake| {
                let start = mistake.span.as_ref().map(|span| span.start);
                !mistake.is_warning && start.is_some_and(|start| span.contains(&start))
            })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    /// In the order of the text; those without a place come last.
    pub(super) fn sorted(&self) -> Vec<&Mistake> {
        let mut all: Vec<&Mistake> = self.told.iter().collect();
        all.sort_by_key(|mistake| {
            let start = mistake.span.as_ref().map(|span| span.start);
            (start.is_none(), start)
        });
        all
    }
}

impl Source {
    pub(super) fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            text: text.into(),
        }
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Line and column, counted from 1, and the line itself. The column counts characters.
    fn place(&self, at: usize) -> (usize, usize, &str) {
        let mut at = at.min(self.text.len());
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        let before = &self.text[..at];
        let start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = self.text[start..].lines().next().unwrap_or_default();
        let number = before.matches('\n').count() + 1;
        let column = before[start..].chars().count() + 1;
        (number, column, line)
    }

    /// A mistake as a person reads it: what and where, and the line.
    pub(super) fn show(&self, mistake: &Mistake) -> String {
        let kind = if mistake.is_warning {
            "warning"
        } else {
            "error"
        };
        let message = &mistake.message;
        let Some(span) = &mistake.span else {
            return format!("{}: {kind}: {message}", self.name);
        };
        let (number, column, line) = self.place(span.start);
        let first = column - 1;
        // Of a long line, what is around the place.
        let from = first.saturating_sub(SHOWN / 2);
        let shown: String = line
            .chars()
            .skip(from)
            .take(SHOWN)
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        let room = shown.chars().count().saturating_sub(first - from);
        let marked = self
            .text
            .get(span.clone())
            .map_or(1, |text| text.chars().take_while(|c| *c != '\n').count());
        let marks = "^".repeat(marked.clamp(1, room.max(1)));
        let blank = " ".repeat(first - from);
        let width = number.to_string().len().max(4);
        let name = &self.name;
        format!(
            "{name}:{number}:{column}: {kind}: {message}\n{number:>width$} | {shown}\n{:>width$} | {blank}{marks}",
            ""
        )
    }

    /// All of them.
    pub(super) fn show_all(&self, mistakes: &Mistakes) -> String {
        let mut shown: Vec<String> = mistakes
            .sorted()
            .into_iter()
            .map(|mistake| self.show(mistake))
            .collect();
        if mistakes.are_too_many() {
            shown.push(format!("{}: error: and more than these {MOST}", self.name));
        }
        shown.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_is_shown_with_its_line_and_column() {
        let source = Source::new("a.toml", "one = 1\ntwö = \"x\" # end\n");
        let mut mistakes = Mistakes::default();
        let at = source.text().find('"').expect("it is there");
        mistakes.error(at..at + 3, "no");
        mistakes.warning(None, "hm");
        assert_eq!(
            source.show_all(&mistakes),
            "a.toml:2:7: error: no\n   2 | twö = \"x\" # end\n     |       ^^^\na.toml: warning: hm"
        );
        assert!(mistakes.are_fatal());
    }

    #[test]
    fn places_beyond_the_text_and_endless_lines_are_shown_all_the_same() {
        let long = "x".repeat(10_000);
        for text in ["", "é", "\n\n", &long] {
            let source = Source::new("a", text);
            for at in [0, 1, 2, 5_000, 20_000] {
                let mistake = Mistake {
                    span: Some(at..at + 7),
                    message: "no".to_owned(),
                    is_warning: false,
                };
                assert!(source.show(&mistake).len() < 600);
            }
        }
    }
}
