// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which windows the device host has of the guest's memory.

use crate::link::SessionHandle;
use crate::session::{Op, OpError, Window};
use std::collections::BTreeSet;

/// What the session was told. Nothing is lent before a driver starts a queue, and from then on what the client opens and closes.
#[derive(Debug)]
pub(super) struct Lending {
    session: SessionHandle,
    lent: Lent,
}

#[derive(Debug)]
enum Lent {
    /// Nothing, and what the client opens is none of the session's business.
    Nothing,
    /// The windows at these addresses.
    Windows(BTreeSet<u64>),
    /// An operation has failed, and it is not known what of it the device host has.
    Unknown,
}

impl Lending {
    pub(super) fn new(session: SessionHandle) -> Lending {
        Lending {
            session,
            lent: Lent::Nothing,
        }
    }

    /// Lends exactly `windows`.
    pub(super) fn lend(&mut self, windows: Vec<Window>) -> Result<(), OpError> {
        let bases: BTreeSet<u64> = windows.iter().map(|window| window.base).collect();
        match &self.lent {
            Lent::Windows(lent) => {
                let remove = lent.iter().copied().collect();
                self.change(remove, windows).inspect_err(|_| {
                    self.lent = Lent::Unknown;
                })?;
            }
            Lent::Nothing => self.change(Vec::new(), windows)?,
            Lent::Unknown => {
                self.take_back()?;
                self.change(Vec::new(), windows)?;
            }
        }
        self.lent = Lent::Windows(bases);
        Ok(())
    }

    /// Whether what the client opens and closes has to be told.
    pub(super) fn is_on(&self) -> bool {
        matches!(self.lent, Lent::Windows(_))
    }

    /// The client has opened this.
    pub(super) fn add(&mut self, window: Window) -> Result<(), OpError> {
        if !self.is_on() {
            return Ok(());
        }
        let base = window.base;
        self.change(Vec::new(), vec![window])?;
        if let Lent::Windows(lent) = &mut self.lent {
            lent.insert(base);
        }
        Ok(())
    }

    /// The client has closed what lies between `from` and `to`, the last address. Done when the device host has let go of it.
    pub(super) fn remove(&mut self, from: u64, to: u64) -> Result<(), OpError> {
        let lent = match &mut self.lent {
            Lent::Nothing => return Ok(()),
            Lent::Windows(lent) => lent,
            Lent::Unknown => return self.take_back(),
        };
        let gone: Vec<u64> = lent.range(from..=to).copied().collect();
        if gone.is_empty() {
            return Ok(());
        }
        for base in &gone {
            lent.remove(base);
        }
        self.change(gone, Vec::new())
    }

    /// Takes all windows back.
    pub(super) fn take_back(&mut self) -> Result<(), OpError> {
        if !matches!(self.lent, Lent::Nothing) {
            self.session.call(Op::SetWindows(Vec::new()))?;
            self.lent = Lent::Nothing;
        }
        Ok(())
    }

    fn change(&mut self, remove: Vec<u64>, add: Vec<Window>) -> Result<(), OpError> {
        let op = Op::ChangeWindows { remove, add };
        self.session.call(op).map(drop).inspect_err(|error| {
            // Recorded all the same.
            if *error != OpError::StillInUse {
                self.lent = Lent::Unknown;
            }
        })
    }
}
