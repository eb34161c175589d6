// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device that has the segment, and nothing else.

use crate::guest::of_queue;
use rustix::event::epoll;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use virtio_msg::FeatureSet;
use vmsg_mem::{Access, BusAddr, Doorbell, Mapping, TableEntry, WindowTable};
use vmsg_proxy::session::Window;
use vmsg_proxy::shadow::Started;
use vmsg_queue::{ChainHead, ChainStorage, DeviceQueue, QueueConfig};

/// The segment as a device host has it: by its file.
pub(crate) fn map(window: &Window) -> Arc<Mapping> {
    let fd = window.fd.as_fd();
    assert!(vmsg_mem::check_seals(fd).unwrap(), "it cannot shrink");
    let mapping = Mapping::of_fd(fd, window.file_offset, window.len, Access::ReadWrite);
    Arc::new(mapping.unwrap())
}

pub(crate) fn table(window: &Window) -> WindowTable {
    let entry = TableEntry {
        base: BusAddr(window.base),
        mapping: map(window),
        offset: 0,
        len: window.len as usize,
        access: Access::ReadWrite,
    };
    WindowTable::new(vec![entry]).unwrap()
}

pub(crate) fn config(started: &Started) -> QueueConfig {
    QueueConfig {
        size: started.setup.size,
        desc: BusAddr(started.setup.descriptor),
        driver: BusAddr(started.setup.driver),
        device: BusAddr(started.setup.device),
    }
}

/// A request as the device has it.
pub(crate) struct Request {
    pub(crate) head: ChainHead,
    pub(crate) readable: Vec<u8>,
    pub(crate) writable: usize,
}

/// One queue in the hands of a device that is told what to do.
pub(crate) struct Hand {
    pub(crate) table: WindowTable,
    pub(crate) queue: DeviceQueue,
    storage: ChainStorage,
    kick: Arc<OwnedFd>,
    call: Doorbell,
    epoll: OwnedFd,
}

impl Hand {
    pub(crate) fn new(window: &Window, started: &Started, features: &FeatureSet) -> Hand {
        let table = table(window);
        let queue = DeviceQueue::new(config(started), of_queue(features), table.space()).unwrap();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let data = epoll::EventData::new_u64(0);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &started.kick, data, flags).unwrap();
        Hand {
            table,
            queue,
            storage: ChainStorage::with_capacity(4096),
            kick: started.kick.clone(),
            call: Doorbell::from_fd(started.call.try_clone().unwrap()).unwrap(),
            epoll,
        }
    }

    /// Takes what there is.
    pub(crate) fn take(&mut self, max: usize) -> Vec<Request> {
        let batch = self
            .queue
            .pop(self.table.space(), &mut self.storage, max)
            .unwrap();
        let requests = batch.iter().map(|chain| {
            let mut readable = vec![0; chain.readable().len()];
            chain.readable().read(&mut readable);
            let mut writable = vec![0; chain.writable().len()];
            chain.writable().read(&mut writable);
            assert!(writable.iter().all(|&b| b == 0), "room holds zeroes");
            Request {
                head: chain.head(),
                readable,
                writable: writable.len(),
            }
        });
        requests.collect()
    }

    /// Takes at least one, asleep until there is one.
    pub(crate) fn wait(&mut self) -> Vec<Request> {
        loop {
            let requests = self.take(usize::MAX);
            if !requests.is_empty() {
                return requests;
            }
            if self.queue.enable_notifications(self.table.space()).unwrap() {
                continue;
            }
            self.sleep();
        }
    }

    fn sleep(&self) {
        let mut space = [MaybeUninit::<epoll::Event>::uninit()];
        let time = rustix::event::Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        let (found, _) = epoll::wait(&self.epoll, &mut space, Some(&time)).unwrap();
        assert!(!found.is_empty(), "a kick comes");
    }

    /// Gives a request back with `data` written, saying that `written` bytes are there.
    pub(crate) fn give(&mut self, head: ChainHead, written: u32) {
        self.queue
            .complete(self.table.space(), head, written)
            .unwrap();
    }

    pub(crate) fn publish(&mut self) {
        if self.queue.publish(self.table.space()).unwrap() {
            self.call.ring().unwrap();
        }
    }

    /// Rings whether or not it is wanted.
    pub(crate) fn ring(&self) {
        self.call.ring().unwrap();
    }
}

/// What an echo device answers.
pub(crate) fn answer(bytes: &mut [u8]) {
    for byte in bytes {
        *byte ^= 0x5a;
    }
}

/// A device in a thread: writes back what it read, changed, as far as there is room; what it read last comes first.
pub(crate) struct Echo {
    stop: Arc<AtomicBool>,
    kick: Doorbell,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    pub(crate) fn start(window: &Window, started: &Started, features: &FeatureSet) -> Echo {
        let mut hand = Hand::new(window, started, features);
        let stop = Arc::new(AtomicBool::new(false));
        let kick = Doorbell::from_fd(hand.kick.try_clone().unwrap()).unwrap();
        let stopped = stop.clone();
        let mut storage = ChainStorage::with_capacity(4096);
        let thread = std::thread::spawn(move || {
            let Hand {
                table,
                queue,
                call,
                epoll,
                ..
            } = &mut hand;
            let space = table.space();
            while !stopped.load(Ordering::Relaxed) {
                queue.disable_notifications(space).unwrap();
                let batch = queue.pop(space, &mut storage, 32).unwrap();
                let answers: Vec<_> = batch
                    .iter()
                    .map(|chain| {
                        let n = chain.readable().len().min(chain.writable().len());
                        let mut bytes = vec![0; n];
                        chain.readable().read(&mut bytes);
                        answer(&mut bytes);
                        chain.writable().write(&bytes);
                        (chain.head(), n as u32)
                    })
                    .collect();
                // In another order than they came.
                for (head, n) in answers.into_iter().rev() {
                    queue.complete(space, head, n).unwrap();
                }
                if queue.publish(space).unwrap() {
                    call.ring().unwrap();
                }
                if batch.is_empty() && !queue.enable_notifications(space).unwrap() {
                    let mut space = [MaybeUninit::<epoll::Event>::uninit()];
                    let _ = epoll::wait(&*epoll, &mut space, None);
                }
            }
        });
        Echo {
            stop,
            kick,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.kick.ring();
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the device");
    }
}
