// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tables for people.

use std::io::{self, Write};

use crate::trace::clean;

/// Characters of a cell that are shown.
const LONGEST: usize = 64;

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
        self.rows
            .push(cells.iter().map(|cell| shown(cell)).collect());
    }

    /// Its lines, without their ends.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut widths: Vec<usize> = self.head.iter().map(|cell| cell.len()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for (cell, width) in cells.zip(&widths) {
                text.push_str(&format!("{cell:<width$}  "));
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
fn shown(text: &str) -> String {
    clean(&text.chars().take(LONGEST).collect::<String>())
}
