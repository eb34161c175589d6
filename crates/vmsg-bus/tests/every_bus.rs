// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What holds for every bus, run for each of them.
#![cfg(all(
    feature = "loopback",
    feature = "unix",
    feature = "linux-user",
    feature = "ivshmem"
))]

#[macro_use]
mod suite;

mod loopback {
    use crate::suite::{Made, Want};
    use vmsg_bus::Capabilities;
    use vmsg_bus::loopback::{Options, pair};

    fn make(want: Want) -> Made {
        let capabilities = Capabilities::all(want.message_size);
        let options = Options {
            capabilities,
            slots: want.slots,
            ..Options::default()
        };
        let (driver, device) = pair(&options).unwrap();
        Made {
            driver,
            device,
            room: want.slots - 1,
            keep: Box::new(()),
        }
    }

    mod any {
        use super::make;
        bus_suite!(make);
    }
    mod shaped {
        use super::make;
        shaped_suite!(make);
    }
    mod descriptors {
        use super::make;
        descriptor_suite!(make);
    }
}

mod unix {
    use crate::suite::{Made, Want, accept};
    use vmsg_bus::Capabilities;
    use vmsg_bus::unix::{Connector, Listener, ListenerOptions};

    fn make(want: Want) -> Made {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bus.sock");
        let options = ListenerOptions {
            capabilities: Capabilities::all(want.message_size),
            slots: want.slots,
            ..ListenerOptions::default()
        };
        let mut listener = Listener::bind(&path, options).unwrap().into();
        let connector = Connector::new(&path, "test");
        let driver = std::thread::spawn(move || connector.connect().unwrap());
        let device = accept(&mut listener);
        Made {
            driver: driver.join().unwrap(),
            device,
            room: want.slots - 1,
            keep: Box::new((listener, dir)),
        }
    }

    mod any {
        use super::make;
        bus_suite!(make);
    }
    mod shaped {
        use super::make;
        shaped_suite!(make);
    }
    mod descriptors {
        use super::make;
        descriptor_suite!(make);
    }
}

mod linux_user {
    use crate::suite::{Made, Want, accept};
    use vmsg_bus::{BusSpec, LinuxUserSpec};

    /// The host listens, or the driver does.
    fn make(driver_listens: bool) -> Made {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = LinuxUserSpec {
            dir: dir.path().to_owned(),
            server: Some(driver_listens),
            ..LinuxUserSpec::default()
        };
        let connector = BusSpec::LinuxUser(spec.clone()).connector("test");
        spec.server = Some(!driver_listens);
        let mut listener = BusSpec::LinuxUser(spec).listen("test").unwrap();
        let driver = std::thread::spawn(move || connector.connect().unwrap());
        let device = accept(&mut listener);
        Made {
            driver: driver.join().unwrap(),
            device,
            room: 4095,
            keep: Box::new((listener, dir)),
        }
    }

    mod host_listens {
        use super::Made;
        fn make(_: super::Want) -> Made {
            super::make(false)
        }
        bus_suite!(make);
    }

    mod driver_listens {
        use super::Made;
        fn make(_: super::Want) -> Made {
            super::make(true)
        }
        bus_suite!(make);
    }
}

mod ivshmem {
    use crate::suite::{Made, Want, accept};
    use ivshmem::server::{Options, Port, Server};
    use vmsg_bus::ivshmem::QueueLayout;
    use vmsg_bus::{BusSpec, IvshmemSpec};

    fn pair(host: IvshmemSpec, driver: IvshmemSpec, keep: Box<dyn std::any::Any>) -> Made {
        let room = if host.layout == QueueLayout::Amp {
            59
        } else {
            61
        };
        let mut listener = BusSpec::Ivshmem(Box::new(host)).listen("test").unwrap();
        let connector = BusSpec::Ivshmem(Box::new(driver)).connector("test");
        let connector = connector.timeout(crate::suite::LONG);
        let driver = std::thread::spawn(move || connector.connect().unwrap());
        let device = accept(&mut listener);
        Made {
            driver: driver.join().unwrap(),
            device,
            room,
            keep: Box::new((listener, keep)),
        }
    }

    /// A server in a thread, until it is dropped.
    struct Running {
        stop: vmsg_mem::Doorbell,
        thread: Option<std::thread::JoinHandle<()>>,
    }

    impl Running {
        fn start(options: Options) -> Self {
            let mut server = Server::bind(options).unwrap();
            let stop = vmsg_mem::Doorbell::new().unwrap();
            let stopped = stop.try_clone().unwrap();
            let thread = std::thread::spawn(move || {
                server.run(stopped.eventfd().unwrap()).unwrap();
            });
            Self {
                stop,
                thread: Some(thread),
            }
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            self.stop.ring().unwrap();
            self.thread.take().unwrap().join().unwrap();
        }
    }

    /// Without doorbells.
    fn plain(layout: QueueLayout) -> Made {
        let dir = tempfile::tempdir().unwrap();
        let driver = IvshmemSpec {
            layout,
            size: Some(64 << 10),
            ..IvshmemSpec::file(dir.path().join("memory"))
        };
        pair(driver.clone(), driver, Box::new(dir))
    }

    /// Over a server.
    fn served(layout: QueueLayout) -> Made {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ivshmem.sock");
        let options = Options::new(vec![Port::new(&path, 2)], 1 << 20);
        let server = Running::start(options);
        let driver = IvshmemSpec {
            layout,
            ..IvshmemSpec::socket(&path)
        };
        pair(driver.clone(), driver, Box::new((server, dir)))
    }

    mod amp_with_doorbells {
        use super::Made;
        fn make(_: super::Want) -> Made {
            super::served(super::QueueLayout::Amp)
        }
        bus_suite!(make);
    }

    mod pages_with_doorbells {
        use super::Made;
        fn make(_: super::Want) -> Made {
            super::served(super::QueueLayout::Spsc)
        }
        bus_suite!(make);
    }

    mod amp_without_doorbells {
        use super::Made;
        fn make(_: super::Want) -> Made {
            super::plain(super::QueueLayout::Amp)
        }
        bus_suite!(make);
    }

    mod pages_without_doorbells {
        use super::Made;
        fn make(_: super::Want) -> Made {
            super::plain(super::QueueLayout::Spsc)
        }
        bus_suite!(make);
    }

    mod pages_of_a_fifo {
        use super::Made;
        fn make(_: super::Want) -> Made {
            super::plain(super::QueueLayout::AmpPci)
        }
        bus_suite!(make);
    }
}

/// What only the loopback without doorbells does.
mod bare {
    use crate::suite::message;
    use std::time::Duration;
    use virtio_msg::{Channel, ChannelError};
    use vmsg_bus::loopback::{Options, pair};
    use vmsg_bus::{Capabilities, DeviceBus, DriverBus};

    fn make() -> (DriverBus, DeviceBus) {
        let mut capabilities = Capabilities::all(64);
        capabilities.passes_fds = false;
        pair(&Options {
            capabilities,
            slots: 4,
            doorbells: false,
            epoch: 7,
        })
        .unwrap()
    }

    #[test]
    fn wakes_are_flags_for_one_thread_that_runs_both_ends() {
        let (mut driver, mut device) = make();
        let mut buf = [0; 64];
        assert!(device.arm());
        assert!(!device.take_wake());
        driver.try_send(&message(1, 12)).unwrap();
        assert!(!device.take_wake(), "not flushed");
        driver.flush().unwrap();
        assert!(device.take_wake());
        assert!(!device.take_wake());
        assert_eq!(device.try_recv(&mut buf), Ok(Some(12)));
        assert!(driver.wake_fds().doorbell.is_none() && driver.wake_fds().hangup.is_none());
        assert!(driver.wait(Some(Duration::ZERO)).is_err());
        assert_eq!(driver.epoch(), 7);
    }

    #[test]
    fn the_end_wakes_as_well() {
        let (mut driver, device) = make();
        assert!(driver.arm());
        drop(device);
        assert!(driver.take_wake());
        assert_eq!(driver.try_recv(&mut [0; 64]), Ok(None));
        assert!(!driver.arm());
        assert_eq!(driver.try_recv(&mut [0; 64]), Err(ChannelError::Closed));
    }

    #[test]
    fn a_bus_that_passes_no_descriptors_says_so() {
        let (mut driver, mut device) = make();
        let fd = crate::suite::eventfd(0);
        let fds = [std::os::fd::AsFd::as_fd(&fd)];
        assert_eq!(
            driver.try_send_with_fds(&message(1, 12), &fds),
            Err(ChannelError::TooLong)
        );
        assert_eq!(device.try_recv(&mut [0; 64]), Ok(None));
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        for (size, slots) in [(47, 4), (65537, 4), (64, 1), (64, 70_000)] {
            let capabilities = Capabilities::all(size);
            assert!(
                pair(&Options {
                    capabilities,
                    slots,
                    ..Options::default()
                })
                .is_err()
            );
        }
    }
}
