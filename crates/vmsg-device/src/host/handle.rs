// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What other threads may ask of a running host.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use virtio_msg::{DevNum, DeviceStatus, FeatureSet};
use vmsg_mem::Doorbell;

use super::connection::Peer;
use super::core::AddError;
use crate::device::{Device, Operation, Snapshot};

/// How long an answer may take. Control answers at once; a worker when the
/// turn of the queue that it serves is over.
const PATIENCE: Duration = Duration::from_secs(5);

/// A device as its host sees it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Index of its bus.
    pub bus: usize,
    /// Its number there.
    pub number: DevNum,
    /// Its name.
    pub name: String,
    /// Virtio device id: 1 network, 4 entropy, …
    pub device_id: u32,
    /// What its driver has set.
    pub status: DeviceStatus,
    /// What its driver has negotiated.
    pub features: FeatureSet,
    /// Who holds it.
    pub holder: Option<Peer>,
    /// Which worker serves it.
    pub worker: usize,
    /// Link and counters, if it has any.
    pub snapshot: Option<Snapshot>,
}

/// Why something cannot be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandleError {
    /// No device has this name.
    #[error("there is no device called `{0}`")]
    NoDevice(String),
    /// Devices of several buses have this name.
    #[error("there is a device called `{0}` on more than one bus")]
    Ambiguous(String),
    /// The device does not do that, at least not now.
    #[error("`{device}`: {why}")]
    Refused {
        /// Its name.
        device: String,
        /// Its words.
        why: String,
    },
    /// The device cannot be added.
    #[error(transparent)]
    Add(#[from] AddError),
    /// There are fewer buses.
    #[error("there is no bus {0}")]
    NoBus(usize),
    /// There are fewer workers.
    #[error("there is no worker {0}")]
    NoWorker(usize),
    /// The host does not answer in time.
    #[error("no answer in {} seconds", PATIENCE.as_secs())]
    Timeout,
    /// The host does not run any more.
    #[error("the device host has ended")]
    Gone,
}

/// A question with the place for its answer.
pub(super) enum Request {
    List(Sender<Vec<Report>>),
    Add {
        bus: usize,
        name: String,
        num: Option<u16>,
        worker: Option<usize>,
        device: Box<dyn Device>,
        answer: Sender<Result<DevNum, HandleError>>,
    },
    Remove {
        bus: Option<usize>,
        device: String,
        answer: Sender<Result<(), HandleError>>,
    },
    AddResident {
        worker: usize,
        device: Box<dyn Device>,
        answer: Sender<Result<(), HandleError>>,
    },
    Operate {
        bus: Option<usize>,
        device: String,
        operation: Operation,
        answer: Sender<Result<(), HandleError>>,
    },
}

/// Asks things of a [`Host`](super::Host) that runs in another thread. Calls
/// wait for the answer; the host never waits for anybody.
#[derive(Clone, Debug)]
pub struct Handle {
    requests: Sender<Request>,
    bell: Arc<Doorbell>,
}

impl Handle {
    /// A handle, and the end at which its requests arrive after `bell` rang.
    pub(super) fn new(bell: Arc<Doorbell>) -> (Self, Receiver<Request>) {
        let (requests, inbox) = mpsc::channel();
        (Self { requests, bell }, inbox)
    }

    /// All devices, by bus and number.
    ///
    /// # Errors
    ///
    /// [`HandleError::Gone`], [`HandleError::Timeout`].
    pub fn list(&self) -> Result<Vec<Report>, HandleError> {
        let (answer, result) = mpsc::channel();
        self.ask(Request::List(answer), &result)
    }

    /// Has `operation` done to the device called `name`, on the bus with index
    /// `bus` if that is given.
    ///
    /// # Errors
    ///
    /// [`HandleError`].
    pub fn operate(
        &self,
        bus: Option<usize>,
        name: &str,
        operation: Operation,
    ) -> Result<(), HandleError> {
        let (answer, result) = mpsc::channel();
        let request = Request::Operate {
            bus,
            device: name.to_owned(),
            operation,
            answer,
        };
        self.ask(request, &result)?
    }

    /// Puts a device on the bus with index `bus`, as [`Host::add_device`](super::Host::add_device); drivers that are there hear of it.
    ///
    /// # Errors
    ///
    /// [`HandleError::Add`] if the number or the name is taken, or the number was; [`HandleError::NoBus`], [`HandleError::NoWorker`].
    pub fn add_device(
        &self,
        bus: usize,
        name: &str,
        num: Option<u16>,
        worker: Option<usize>,
        device: Box<dyn Device>,
    ) -> Result<DevNum, HandleError> {
        let (answer, result) = mpsc::channel();
        let request = Request::Add {
            bus,
            name: name.to_owned(),
            num,
            worker,
            device,
            answer,
        };
        self.ask(request, &result)?
    }

    /// Takes the device called `name` away, on the bus with index `bus` if that is given. It is reset, whoever holds it; drivers hear that
    /// it is gone. When this returns, its worker has let go of it. Its number is not given to another device.
    ///
    /// # Errors
    ///
    /// [`HandleError::NoDevice`], also if it is just being removed; [`HandleError::Ambiguous`]. After [`HandleError::Timeout`] it goes as
    /// soon as it can.
    pub fn remove_device(&self, bus: Option<usize>, name: &str) -> Result<(), HandleError> {
        let (answer, result) = mpsc::channel();
        let device = name.to_owned();
        let request = Request::Remove {
            bus,
            device,
            answer,
        };
        self.ask(request, &result)?
    }

    /// Has a worker poll something that is on no bus, as [`Host::add_resident`](super::Host::add_resident).
    ///
    /// # Errors
    ///
    /// [`HandleError::NoWorker`].
    pub fn add_resident(&self, worker: usize, device: Box<dyn Device>) -> Result<(), HandleError> {
        let (answer, result) = mpsc::channel();
        let request = Request::AddResident {
            worker,
            device,
            answer,
        };
        self.ask(request, &result)?
    }

    fn ask<T>(&self, request: Request, result: &Receiver<T>) -> Result<T, HandleError> {
        self.requests.send(request).map_err(|_| HandleError::Gone)?;
        // Full: then the host is about to look.
        let _ = self.bell.ring();
        result.recv_timeout(PATIENCE).map_err(|error| match error {
            RecvTimeoutError::Timeout => HandleError::Timeout,
            RecvTimeoutError::Disconnected => HandleError::Gone,
        })
    }
}
