// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest: the console driver of `virtio-drivers`, which says everything back in capitals.

use std::cell::RefCell;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use virtio_drivers::device::console::VirtIOConsole;
use virtio_msg::DevNum;
use vmsg_bus::BusSpec;
use vmsg_driver::virtio_drivers::{MsgTransport, PoolHal, StaticPool};
use vmsg_driver::{Client, DmaPool, Sleep};
use vmsg_mem::BusAddr;

struct Memory;

impl StaticPool for Memory {
    fn pool() -> &'static DmaPool {
        static POOL: LazyLock<DmaPool> = LazyLock::new(|| {
            DmaPool::new("guests", BusAddr(0x4000_0000), 8 << 20).expect("memory")
        });
        &POOL
    }
}

enum Order {
    Say(String),
    Emergency(u8),
}

/// What is seen of it from outside.
#[derive(Default)]
struct Seen {
    heard: String,
    size: (u16, u16),
}

pub(crate) struct Guest {
    orders: Option<Sender<Order>>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    /// Drives the device with this number on the bus in `folder`, and is ready.
    pub(crate) fn start(folder: &Path, device: u16) -> Self {
        let path = folder.join("b0.sock");
        let (orders, inbox) = channel();
        let (ready, started) = channel();
        let seen = Arc::<Mutex<Seen>>::default();
        let shared = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            let spec: BusSpec = format!("unix,path={}", path.display())
                .parse()
                .expect("a bus");
            let bus = spec.connector("guest").connect().expect("connected");
            let client = Client::new(bus, Sleep::new(), vec![0; 4096]).expect("a client");
            let client = RefCell::new(client);
            Memory::pool()
                .lend(&mut client.borrow_mut(), 1)
                .expect("lent");
            let transport = MsgTransport::new(&client, DevNum(device)).expect("a device");
            let mut console =
                VirtIOConsole::<PoolHal<Memory>, _>::new(transport).expect("a console");
            ready.send(()).expect("somebody waits");
            while go_on(&mut console, &inbox, &shared) {
                // A guest without interrupts looks now and then.
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        started.recv().expect("it starts");
        Self {
            orders: Some(orders),
            seen,
            thread: Some(thread),
        }
    }

    fn order(&self, order: Order) {
        let orders = self.orders.as_ref().expect("while it runs");
        orders.send(order).expect("it runs");
    }

    /// Has it write `text`.
    pub(crate) fn say(&self, text: &str) {
        self.order(Order::Say(text.to_owned()));
    }

    /// Has it write a character as one that cannot do anything else.
    pub(crate) fn emergency(&self, character: u8) {
        self.order(Order::Emergency(character));
    }

    /// All that was typed.
    pub(crate) fn heard(&self) -> String {
        self.seen.lock().expect("no panic").heard.clone()
    }

    /// Columns and rows as it knows them.
    pub(crate) fn size(&self) -> (u16, u16) {
        self.seen.lock().expect("no panic").size
    }
}

fn go_on<T: virtio_drivers::transport::Transport>(
    console: &mut VirtIOConsole<PoolHal<Memory>, T>,
    inbox: &Receiver<Order>,
    shared: &Mutex<Seen>,
) -> bool {
    loop {
        match inbox.try_recv() {
            Ok(Order::Say(text)) => console.send_bytes(text.as_bytes()).expect("written"),
            Ok(Order::Emergency(character)) => {
                console.emergency_write(character).expect("written");
            }
            Err(TryRecvError::Empty) => break,
            Err(TryRecvError::Disconnected) => return false,
        }
    }
    let mut typed = Vec::new();
    while let Some(byte) = console.recv(true).expect("a sound queue") {
        typed.push(byte);
    }
    let size = console.size().expect("a size").expect("it is offered");
    let mut seen = shared.lock().expect("no panic");
    seen.size = (size.columns, size.rows);
    seen.heard.push_str(&String::from_utf8_lossy(&typed));
    drop(seen);
    if !typed.is_empty() {
        console
            .send_bytes(&typed.to_ascii_uppercase())
            .expect("written");
    }
    true
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.orders = None;
        let ended = self.thread.take().expect("joined once").join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}
