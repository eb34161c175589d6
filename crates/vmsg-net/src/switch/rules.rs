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
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_letters() {
        for (pattern, name, wanted) in [
            ("*", "net0", true),
            ("*", "", true),
            ("net0", "net0", true),
            ("net0", "net01", false),
            ("web*", "web", true),
            ("web*", "webserver", true),
            ("web*", "we", false),
            ("*0", "net0", true),
            ("*0", "net01", false),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "abbbcbc", true),
            ("a*b*c", "acb", false),
            ("**", "x", true),
        ] {
            let pattern: Pattern = pattern.parse().unwrap();
            assert_eq!(pattern.matches(name), wanted, "{pattern} {name}");
        }
    }

    #[test]
    fn a_pattern_of_many_stars_does_not_take_forever() {
        let pattern: Pattern = "*a".repeat(32).parse().unwrap();
        assert!(!pattern.matches(&format!("{}b", "a".repeat(63))));
    }

    #[test]
    fn both_directions_are_two_rules() {
        let one = Rule::parse(true, "a>b").unwrap();
        assert_eq!(one.len(), 1);
        assert_eq!(one[0].to_string(), "allow a > b");
        let two = Rule::parse(false, "web* <> *").unwrap();
        assert_eq!(two[1].to_string(), "deny * > web*");
        assert_eq!(Rule::parse(true, "* <> *").unwrap().len(), 1);
        for bad in [
            "",
            "a",
            "a b",
            "a >",
            "> b",
            "a > b > c",
            "a < b",
            "a <> b!",
            "a >> b",
        ] {
            Rule::parse(true, bad).unwrap_err();
        }
    }

    #[test]
    fn a_rule_for_the_same_patterns_replaces_the_older_and_comes_last() {
        let mut rules = Rule::parse(true, "a <> b").unwrap();
        put(&mut rules, Rule::parse(false, "a > b").unwrap().remove(0));
        let texts: Vec<String> = rules.iter().map(Rule::to_string).collect();
        assert_eq!(texts, ["allow b > a", "deny a > b"]);
    }
}
