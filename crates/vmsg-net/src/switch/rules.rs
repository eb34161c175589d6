// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who may send to whom.

use std::fmt;
use std::str::FromStr;

/// The text is no pattern for names of ports, or no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRule {
    /// Neither `>` nor `<>`.
    #[error("`{0}` is not a rule such as `a > b` or `web* <> *`")]
    Shape(String),
    /// A pattern with something that no name has.
    #[error("`{0}` is not a name of a port, perhaps with `*` for any part of it")]
    Pattern(String),
}

/// True for a name that a port can have.
pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= 64 && text.chars().all(is_letter)
}

fn is_letter(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || "-_.:@/+".contains(letter)
}

/// A name of a port, or many: `*` stands for any letters, or none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pattern(String);

impl Pattern {
    /// Every port.
    pub fn any() -> Self {
        Self("*".to_owned())
    }

    /// True if it means the port `name`.
    pub fn matches(&self, name: &str) -> bool {
        let pattern = self.0.as_bytes();
        let name = name.as_bytes();
        let (mut p, mut n) = (0, 0);
        // Behind the last star, and what it stands for at present ends there.
        let mut retry: Option<(usize, usize)> = None;
        while n < name.len() {
            match pattern.get(p) {
                Some(b'*') => {
                    p += 1;
                    retry = Some((p, n));
                }
                Some(letter) if *letter == name[n] => {
                    p += 1;
                    n += 1;
                }
                _ => match &mut retry {
                    Some((after, end)) => {
                        *end += 1;
                        (p, n) = (*after, *end);
                    }
                    None => return false,
                },
            }
        }
        pattern[p..].iter().all(|letter| *letter == b'*')
    }
}

impl FromStr for Pattern {
    type Err = BadRule;

    fn from_str(text: &str) -> Result<Self, BadRule> {
        let valid = !text.is_empty()
            && text.len() <= 64
            && text
                .chars()
                .all(|letter| letter == '*' || is_letter(letter));
        valid
            .then(|| Self(text.to_owned()))
            .ok_or_else(|| BadRule::Pattern(text.to_owned()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Some ports may, or may not, send to some others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// They may.
    pub allow: bool,
    /// The senders.
    pub from: Pattern,
    /// The receivers.
    pub to: Pattern,
}

impl Rule {
    /// Reads `a > b`, one rule, or `a <> b`, two of them: one for each direction.
    ///
    /// # Errors
    ///
    /// [`BadRule`] if it is neither.
    pub fn parse(allow: bool, text: &str) -> Result<Vec<Self>, BadRule> {
        let shape = || BadRule::Shape(text.to_owned());
        let (pair, both) = match text.split_once("<>") {
            Some(pair) => (pair, true),
            None => (text.split_once('>').ok_or_else(shape)?, false),
        };
        let from: Pattern = pair.0.trim().parse()?;
        let to: Pattern = pair.1.trim().parse()?;
        let mut rules = vec![Self {
            allow,
            from: from.clone(),
            to: to.clone(),
        }];
        if both && from != to {
            rules.push(Self {
                allow,
                from: to,
                to: from,
            });
        }
        Ok(rules)
    }

    /// Every port may send to every other.
    pub fn allow_all() -> Self {
        Self {
            allow: true,
            from: Pattern::any(),
            to: Pattern::any(),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.allow { "allow" } else { "deny" };
        write!(f, "{what} {} > {}", self.from, self.to)
    }
}

/// Adds `rule` behind `rules`, in place of an older one for the same patterns.
pub(super) fn put(rules: &mut Vec<Rule>, rule: Rule) {
    rules.retain(|old| old.from != rule.from || old.to != rule.to);
    rules.push(rule);
}

#[cfg(test)]
#[path = "rules_test.rs"]
mod tests;
