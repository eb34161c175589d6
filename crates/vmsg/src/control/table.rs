// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tables for people.

use std::io::{self, Write};

use crate::trace::clean;

/// Characters of a cell that are shown.
const LONGEST: usize = 64;
/// The same of the last one, which nothing stands behind.
const LONGEST_LAST: usize = 200;
/// So much of it at least is to be seen.
const LEAST_LAST: usize = 12;
/// What is between two columns.
const GAP: usize = 2;

/// Rows under a head, each column as wide as need be.
#[derive(Debug)]
pub(crate) struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// One with these columns.
    pub(crate) fn new(head: &[&'static str]) -> Self {
        Self {
            head: head.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row with a cell for each column. What is in the cells comes from the other side of a
    /// socket: they are shortened, and what a terminal would not just print is escaped.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.head.len());
        let last = N.saturating_sub(1);
        let cells = cells.iter().enumerate();
        self.rows.push(
            cells
                .map(|(index, cell)| {
                    shown(cell, if index == last { LONGEST_LAST } else { LONGEST })
                })
                .collect(),
        );
    }

    /// Leaves columns out until its lines have `columns` characters at most, or only those are left that `spare` does not name, in
    /// which what can be spared best stands first. The last one may be longer than there is room for: it can be cut.
    pub(crate) fn fit(&mut self, columns: usize, spare: &[&str]) {
        for name in spare {
            let mut widths = self.widths();
            if let Some(last) = widths.last_mut() {
                *last = (*last).min(LEAST_LAST);
            }
            let width: usize = widths.iter().map(|width| width + GAP).sum();
            if width.saturating_sub(GAP) <= columns {
                return;
            }
            if let Some(index) = self.head.iter().position(|head| head == name) {
                self.head.remove(index);
                for row in &mut self.rows {
                    row.remove(index);
                }
            }
        }
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<usize> = self.head.iter().map(|cell| cell.len()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        widths
    }

    /// Its lines, without their ends.
    pub(crate) fn lines(&self) -> Vec<String> {
        let widths = self.widths();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for (cell, width) in cells.zip(&widths) {
                text.push_str(&format!("{cell:<width$}{:GAP$}", ""));
            }
            text.truncate(text.trim_end().len());
            text
        };
        let head = line(&mut self.head.iter().copied());
        let rows = self.rows.iter();
        let rows = rows.map(|row| line(&mut row.iter().map(String::as_str)));
        std::iter::once(head).chain(rows).collect()
    }

    /// Prints it.
    pub(crate) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        self.lines()
            .iter()
            .try_for_each(|line| writeln!(out, "{line}"))
    }
}

/// A name as a terminal may have it.
fn shown(text: &str, longest: usize) -> String {
    clean(&text.chars().take(longest).collect::<String>())
}

#[cfg(test)]
#[path = "table_test.rs"]
mod tests;
