// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies of a guest's queues in memory of their own, for device hosts that are to see nothing else.
//!
//! A device host is lent one piece of memory, the segment: a sealed memfd, or a part of memory that it has anyway ([`Segment`]). For each queue of the guest there is another one in the segment, of
//! which the device host is told. A thread of its own goes between the two: what a request has for the device to read is copied into
//! buffers of the segment, room for what the device writes is taken there, zeroed, and what the device says it has written is copied to
//! the guest. Then the buffers are wiped. So a device host sees what the guest's driver sends to the device, while it does, and
//! nothing else: no other byte of the guest's memory, and not even its addresses.
//!
//! * The device host may write anything into the segment at any time. All that the thread must know it keeps for itself; used
//!   elements are checked, and each byte is read once.
//! * The guest's driver may put anything into its rings. A request that the segment can never hold, an impossible chain or memory that is not
//!   there stop all queues with [`Event::NeedsReset`]; a request for which there is no room now waits, in its queue's order.
//! * Half of the segment's buffers are divided among the queues, the rest is for all: no queue can keep another one from working.
//! * The guest's memory may lie behind messages to its VMM, which may never be answered. [`Shadow::stop_queue`] and [`Shadow::reset`] cancel
//!   such accesses and return soon.
mod division;
mod features;
mod lane;
mod pool;
mod record;
mod segment;
mod shared;
mod types;
mod worker;

pub use features::offered;
pub use segment::{Common, DivideError, Part, Parts, ProvideError, Segment, Source};
pub use types::{Broken, Counters, Event, Interrupt, NewError, Options, StartError, Started};

use crate::memory::GuestMemory;
use crate::session::{DeviceFacts, QueueSetup, ResumeAt, Window};
use division::Division;
use segment::Plot;
use shared::{Bell, Command, NewQueue, Shared};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_msg::{FeatureSet, QueueIndex};
use vmsg_mem::{BusAddr, Doorbell, Mapping};
use vmsg_queue::QueueConfig;

/// How long the thread may take before what it waits for is cancelled, again and again.
const PATIENCE: Duration = Duration::from_millis(1);

/// The shadow queues of one device. See the module.
///
/// The session and this are told the same things. In which order:
///
/// ```text
/// set_features → Op::SetFeatures of what it returns
/// start_queue → Op::SetNotify and Op::SetQueue of what it returns
/// Op::SetStatus(DRIVER_OK) → run
/// Op::StopQueue → stop_queue
/// Op::SetStatus(0) → reset
/// ```
///
/// With the segment the session is given [`Self::renewal`], so that it can go on with another device host where nobody keeps a record of what is in flight.
pub struct Shadow {
    memory: Arc<dyn GuestMemory>,
    shared: Arc<Shared>,
    division: Arc<Division>,
    window: Window,
    plot: Arc<Plot>,
    /// What the device offers.
    offered: FeatureSet,
    /// Of the guest, and towards the device.
    features: Mutex<[FeatureSet; 2]>,
    thread: Option<JoinHandle<()>>,
}

impl Shadow {
    /// Makes the segment, or takes the part of memory that is given for it, and starts the thread.
    ///
    /// # Errors
    /// [`NewError`].
    pub fn new(
        memory: Arc<dyn GuestMemory>,
        facts: &DeviceFacts,
        options: Options,
    ) -> Result<Shadow, NewError> {
        let Options { name, segment } = options;
        let os = |what| move |source: io::Error| NewError::Os { what, source };
        let plot = Arc::new(Plot::new(&name, &segment)?);
        let window = plot.window();
        let indirect = features::of_queue(&facts.offered).indirect;
        let division = Division::new(&facts.queue_sizes, plot.ram().len(), indirect);
        let division = Arc::new(division.map_err(|need| NewError::TooSmall {
            have: window.len,
            need: need as u64,
            queues: facts.queue_sizes.len(),
        })?);
        let queues = division.places.len();
        let shared = Arc::new(Shared::new(queues).map_err(os("an eventfd"))?);
        let epoll = worker::epoll_set(&shared).map_err(os("an epoll set"))?;
        let start = worker::Start {
            memory: memory.clone(),
            shared: shared.clone(),
            plot: plot.clone(),
            division: division.clone(),
            base: window.base,
            epoll,
        };
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || worker::guarded(start))
            .map_err(os("a thread"))?;
        Ok(Shadow {
            memory,
            shared,
            division,
            window,
            plot,
            offered: facts.offered,
            features: Mutex::default(),
            thread: Some(thread),
        })
    }

    /// The segment: all the memory that the device host is to be lent.
    pub fn window(&self) -> Window {
        self.window.clone()
    }

    /// Remembers what the guest has negotiated, which was [`offered`] to it, for queues that are started later. Returns what to negotiate
    /// with the device.
    pub fn set_features(&self, guest: FeatureSet) -> FeatureSet {
        let device = features::towards_device(&guest, &self.offered);
        *self.features.lock().unwrap_or_else(PoisonError::into_inner) = [guest, device];
        device
    }

    /// Lays a queue out in the segment for one of the guest. It works once the driver [is there](Self::run).
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start_queue(&self, queue: QueueIndex, guest: QueueSetup) -> Result<Started, StartError> {
        self.start_queue_recorded(queue, guest, None)
    }

    /// The same, and the guest's requests in flight are noted in memory that outlives this process. Those that are noted there come first, and count
    /// as taken beyond the used index at which the queue goes on.
    pub(crate) fn start_queue_recorded(
        &self,
        queue: QueueIndex,
        guest: QueueSetup,
        record: Option<Mapping>,
    ) -> Result<Started, StartError> {
        let index = queue.to_usize();
        let queue = queue.0;
        let place = self.division.places.get(index).and_then(Option::as_ref);
        let place = place.ok_or(StartError::NoQueue(queue))?;
        let size = guest.size;
        if !size.is_power_of_two() || size > place.size {
            return Err(StartError::BadSize { queue, size });
        }
        let at = match guest.resume {
            ResumeAt::Start => 0,
            // What is in flight was lost with whoever had it: it is given to the device again.
            ResumeAt::Explicit { used, .. } => used,
            ResumeAt::UsedIndex => {
                let why = "it was not said where it goes on".to_owned();
                return Err(StartError::BadQueue { queue, why });
            }
        };
        let os = |error: io::Error| StartError::Os {
            queue,
            why: error.to_string(),
        };
        let kick = Doorbell::new().map_err(os)?;
        let lent = Arc::new(kick.try_clone().map_err(os)?.into());
        let call = Arc::new(Doorbell::new().map_err(os)?.into());
        let [guest_features, device_features] =
            *self.features.lock().unwrap_or_else(PoisonError::into_inner);
        let config = lane::config(place, self.window.base, size, self.division.table)
            .ok_or(StartError::BadSize { queue, size })?;
        let new = NewQueue {
            index,
            config: QueueConfig {
                size,
                desc: BusAddr(guest.descriptor),
                driver: BusAddr(guest.driver),
                device: BusAddr(guest.device),
            },
            at,
            guest: features::of_queue(&guest_features),
            device: features::of_queue(&device_features),
            kick,
            call: Arc::clone(&call),
            record,
        };
        let (reply, started) = mpsc::sync_channel(1);
        self.shared.command(Command::Start(Box::new(new), reply));
        match self.wait(&started) {
            Some(result) => result?,
            None => return Err(os(io::Error::other("the thread has ended"))),
        }
        Ok(Started {
            setup: QueueSetup {
                size,
                descriptor: config.desc.0,
                driver: config.driver.0,
                device: config.device.0,
                resume: ResumeAt::Start,
            },
            kick: lent,
            call,
        })
    }

    /// The guest's driver is ready: its memory may be touched from now on. All queues are looked at once, and those that start later.
    pub fn run(&self) {
        self.shared.command(Command::Run);
    }

    /// The guest's driver has kicked. Takes next to no time.
    pub fn kick(&self, queue: QueueIndex) {
        self.shared.kick(queue.to_usize());
    }

    /// The guest's driver kicks a queue that was started by this eventfd, from now on; [`Self::kick`] does so as well. Whatever is in it counts as a
    /// kick. It is never read, and let go when the queue stops.
    pub fn set_kick(&self, queue: QueueIndex, kick: Option<Arc<OwnedFd>>) {
        self.shared.command(Command::Kick(queue.to_usize(), kick));
    }

    /// How the guest's driver learns of used buffers; before, and after a reset, [`Interrupt::Front`]. Who had [`Interrupt::Nobody`] and gets
    /// something else is notified once.
    pub fn set_interrupt(&self, queue: QueueIndex, interrupt: Interrupt) {
        let bell = match interrupt {
            Interrupt::Nobody => Bell::Nobody,
            Interrupt::Front => Bell::Front,
            Interrupt::Eventfd(fd) => match fd.try_clone().and_then(Doorbell::from_fd) {
                Ok(bell) => Bell::Eventfd(bell),
                Err(error) => {
                    tracing::warn!("queue {} goes without interrupts: {error}", queue.0);
                    Bell::Nobody
                }
            },
        };
        self.shared
            .command(Command::Interrupt(queue.to_usize(), bell));
    }

    /// Stops a queue, after the device was made to. When it returns, nothing of the guest's is touched for the queue any more, and its part of the
    /// segment is wiped. A queue that was not started is left as it is.
    pub fn stop_queue(&self, queue: QueueIndex) {
        let (reply, stopped) = mpsc::sync_channel(1);
        self.shared.command(Command::Stop(queue.to_usize(), reply));
        self.wait(&stopped);
    }

    /// Stops everything, after the device was reset. When it returns, nothing of the guest's is touched any more, the segment is zero, and there
    /// are no news.
    pub fn reset(&self) {
        let (reply, done) = mpsc::sync_channel(1);
        self.shared.command(Command::Reset(reply));
        if self.wait(&done).is_none() {
            // Ended by a mistake: what it left is for us to wipe.
            let all = 0..self.plot.ram().len();
            self.plot.wipe([all]);
        }
        let _ = self.shared.news.drain();
    }

    /// Whether the device host does not see the segment any more ([`Broken::Lost`]): nothing works until there is another one.
    pub fn is_lost(&self) -> bool {
        self.plot.is_lost()
    }

    /// Readable when there may be news; [`Self::clear`] makes it unreadable again.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.shared.news.as_fd()
    }

    /// Call this before taking the news.
    pub fn clear(&self) {
        // Ours alone: nothing else than "nothing there" can go wrong.
        let _ = self.shared.news.drain();
    }

    /// The next news.
    pub fn poll_event(&self) -> Option<Event> {
        self.shared.poll_event()
    }

    /// What went through so far.
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// What begins all queues anew for another device host; for the session.
    pub fn renewal(&self) -> Renewal {
        Renewal {
            memory: self.memory.clone(),
            shared: self.shared.clone(),
        }
    }

    /// Waits for the thread, and cancels what it waits for. `None`: it has ended.
    fn wait<T>(&self, reply: &Receiver<T>) -> Option<T> {
        wait(&*self.memory, reply)
    }
}

fn wait<T>(memory: &dyn GuestMemory, reply: &Receiver<T>) -> Option<T> {
    loop {
        match reply.recv_timeout(PATIENCE) {
            Ok(value) => return Some(value),
            Err(RecvTimeoutError::Timeout) => memory.cancel(),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

/// Begins the queues of a [`Shadow`] anew in the segment, with the requests that a device host had which is gone. Here it is known which these are,
/// whatever the device has done with them and in whatever order: nobody else needs a record of them.
#[derive(Clone)]
pub struct Renewal {
    memory: Arc<dyn GuestMemory>,
    shared: Arc<Shared>,
}

impl Renewal {
    /// Done when nobody uses the segment. After that all queues are to be set up at the device where they were, from their beginning. False if that is
    /// not to be: the device needs a reset.
    pub fn renew(&self) -> bool {
        let (reply, renewed) = mpsc::sync_channel(1);
        self.shared.command(Command::Renew(reply));
        wait(&*self.memory, &renewed).unwrap_or(false)
    }
}

impl fmt::Debug for Renewal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Renewal").finish_non_exhaustive()
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        let (reply, end) = mpsc::sync_channel(1);
        self.shared.command(Command::End(reply));
        self.wait::<()>(&end);
        if let Some(thread) = self.thread.take() {
            // What went wrong in it was told.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Shadow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shadow")
            .field("window", &self.window)
            .field("queues", &self.division.places.len())
            .finish_non_exhaustive()
    }
}
