// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The restart matrix behind the vhost-user front: device host, proxy or front end ended after each message of the front end and under
//! traffic, on each bus, with a device that uses its queue in order and one that does not. A front end that is sent away connects again;
//! if it is sent away once more, its guest starts over, and then everything has to work.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod late;
mod vmm;

use late::{Late, Platter};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Instant;
use vmm::{End, Vmm};
use vmsg_bus::{BusSpec, UnixSpec, keyval};
use vmsg_device::host::{Host, Stop};
use vmsg_proxy::{FrontSpec, Proxy};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bus {
    Unix,
    /// The same, and the guest's memory is kept from the device host.
    Isolated,
    LinuxUser,
    R1,
    /// Memory and nothing else, into which everything is copied.
    Bounce,
}

impl Bus {
    fn is_unix(self) -> bool {
        matches!(self, Bus::Unix | Bus::Isolated)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Host,
    Proxy,
    Vmm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// After so many messages of the front end.
    Message(usize),
    /// After so many requests of the guest.
    Request(usize),
}

#[derive(Clone, Copy, Debug)]
struct Case {
    bus: Bus,
    in_order: bool,
    who: Who,
    when: When,
    twice: bool,
}

/// One line of the table.
#[derive(Debug, Default)]
struct Line {
    cases: usize,
    recovered: usize,
    refused: BTreeMap<String, usize>,
}

/// Processes, as far as threads can be.
struct Stage {
    dir: tempfile::TempDir,
    bus: BusSpec,
    case: Case,
    platter: Platter,
    host: Option<Running>,
    proxy: Option<Proxy>,
}

struct Running {
    stop: Stop,
    thread: JoinHandle<()>,
}

impl Stage {
    fn new(case: Case) -> Stage {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let bus = match case.bus {
            Bus::Unix | Bus::Isolated => BusSpec::Unix(UnixSpec::new(dir.path().join("bus.sock"))),
            Bus::Bounce => {
                std::fs::write(dir.path().join("messages"), vec![0; 1 << 16]).unwrap();
                std::fs::write(dir.path().join("common"), vec![0x66; 1 << 20]).unwrap();
                format!("ivshmem,file={at}/messages,memory=bounce,ram={at}/common")
                    .parse()
                    .unwrap()
            }
            bus => {
                let revision = if bus == Bus::R1 { "r1" } else { "1" };
                let base = vmm::GUEST;
                format!("linux-user,dir={at},ram={at}/ram,mem-offset={base:#x},revision={revision}")
                    .parse()
                    .unwrap()
            }
        };
        let mut stage = Stage {
            dir,
            bus,
            case,
            platter: Platter::default(),
            host: None,
            proxy: None,
        };
        stage.start_host();
        stage.start_proxy();
        stage
    }

    fn start_host(&mut self) {
        let listener = self.bus.listen("test host").unwrap();
        let message_size = match self.case.bus {
            bus if bus.is_unix() || bus == Bus::Bounce => vmsg_bus::DEFAULT_MESSAGE_SIZE,
            _ => 48,
        };
        let mut host = Host::new(1).unwrap();
        let bus = host.add_bus(message_size, Some(listener)).unwrap();
        let device = Late::new(self.case.in_order, self.platter.clone());
        host.add_device(bus, "late", Some(0), None, Box::new(device))
            .unwrap();
        let stop = host.stop_handle();
        let thread = std::thread::spawn(move || host.run().unwrap());
        self.host = Some(Running { stop, thread });
    }

    fn end_host(&mut self) {
        if let Some(host) = self.host.take() {
            host.stop.stop();
            host.thread.join().unwrap();
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("vu.sock")
    }

    fn start_proxy(&mut self) {
        let socket = self.socket();
        let socket = keyval::escape(&socket.to_string_lossy()).into_owned();
        let isolate = match self.case.bus {
            Bus::Isolated => ",isolate=on,segment=1M",
            _ => "",
        };
        let spec: FrontSpec =
            keyval::from_str(&format!("vhost-user,socket={socket},dev=0{isolate}")).unwrap();
        let proxy = Proxy::start(std::slice::from_ref(&self.bus), &[spec], |_| {}).unwrap();
        self.proxy = Some(proxy);
    }

    fn strike(&mut self, who: Who, vmm: &mut Vmm) {
        let times = if self.case.twice { 2 } else { 1 };
        for _ in 0..times {
            match who {
                Who::Host => {
                    self.end_host();
                    self.start_host();
                }
                Who::Proxy => {
                    self.proxy.take();
                    self.start_proxy();
                    vmm.disconnect();
                }
                Who::Vmm => vmm.start_over(),
            }
        }
    }

    /// Plays the case: `None` if all went on, otherwise why the guest had to start over.
    fn play(&mut self) -> Option<String> {
        let case = self.case;
        let ram = self.dir.path().join("ram");
        let keeps = case.bus.is_unix() || case.bus == Bus::Bounce;
        let mut vmm = Vmm::new(self.socket(), ram, keeps);
        let mut struck = false;
        let mut sent_away = 0;
        let mut reason = None;
        let begin = Instant::now();
        while vmm.answered < 18 || vmm.outstanding() > 0 || !struck {
            assert!(
                begin.elapsed() < vmm::PATIENCE,
                "{case:?} hangs: {}",
                vmm.story()
            );
            let end = if vmm.is_set_up() {
                if vmm.answered + (vmm.outstanding() as u64) < 24 && vmm.outstanding() < 6 {
                    vmm.ask();
                    if case.when == When::Request(vmm.asked) && !struck {
                        struck = true;
                        self.strike(case.who, &mut vmm);
                    }
                    continue;
                }
                vmm.await_answer()
            } else {
                let result = vmm.step();
                if case.when == When::Message(vmm.messages) && !struck {
                    struck = true;
                    self.strike(case.who, &mut vmm);
                }
                result
            };
            let Err(end) = end else {
                sent_away = if vmm.is_set_up() { 0 } else { sent_away };
                continue;
            };
            if let End::Broken(what) = end {
                // Without the front end noticing nothing more will come.
                reason = Some(what.to_owned());
                vmm.start_over();
                continue;
            }
            sent_away += 1;
            vmm.disconnect();
            // It may have been sent away because of what was done to others.
            if sent_away > 2 {
                reason = Some("sent away".to_owned());
                vmm.start_over();
            }
        }
        // What the device has told those who copy for it, the driver was not told if they end then.
        let copies = matches!(case.bus, Bus::Isolated | Bus::Bounce);
        if !copies || case.who != Who::Proxy {
            self.platter.check();
        }
        reason
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.proxy.take();
        self.end_host();
    }
}

#[test]
fn whoever_ends_whenever_guests_go_on_or_work_after_they_started_over() {
    let mut table: BTreeMap<_, Line> = BTreeMap::new();
    let thorough = std::env::var_os("VMSG_SIM_CASES").is_some();
    let begin = Instant::now();
    for bus in [
        Bus::Unix,
        Bus::Isolated,
        Bus::LinuxUser,
        Bus::R1,
        Bus::Bounce,
    ] {
        for in_order in [true, false] {
            for who in [Who::Host, Who::Proxy, Who::Vmm] {
                let messages = (1..=vmm::MESSAGES).map(When::Message);
                let requests = (1..=12).map(When::Request);
                let every = match bus {
                    _ if thorough => 1,
                    bus if bus.is_unix() => 2,
                    _ => 5,
                };
                for (index, when) in messages.chain(requests).enumerate() {
                    let twice = index % 4 == 0;
                    // More of them on one bus than on the others.
                    if index % every != 0 {
                        continue;
                    }
                    let case = Case {
                        bus,
                        in_order,
                        who,
                        when,
                        twice,
                    };
                    let refused = Stage::new(case).play();
                    let traffic = matches!(when, When::Request(_));
                    let key = (format!("{bus:?}"), in_order, format!("{who:?}"), traffic);
                    let line = table.entry(key).or_default();
                    line.cases += 1;
                    match refused {
                        None => line.recovered += 1,
                        Some(reason) => *line.refused.entry(reason).or_default() += 1,
                    }
                }
            }
        }
    }
    println!("| bus | device | ended | when | cases | recovered | guest started over |");
    println!("|---|---|---|---|---:|---:|---|");
    for ((bus, in_order, who, traffic), line) in &table {
        let Line {
            cases,
            recovered,
            refused,
        } = line;
        let device = if *in_order {
            "in order"
        } else {
            "out of order"
        };
        let when = if *traffic { "traffic" } else { "set-up" };
        let refused: Vec<_> = refused
            .iter()
            .map(|(why, n)| format!("{n}: {why}"))
            .collect();
        let refused = refused.join("; ");
        println!("| {bus} | {device} | {who} | {when} | {cases} | {recovered} | {refused} |");
        // On these buses the front end keeps what is in flight, or whoever copies does.
        if *in_order || ["Unix", "Isolated", "Bounce"].contains(&&**bus) {
            assert_eq!(cases, recovered, "{bus} {device} {who} {when}: {refused}");
        }
    }
    println!("{:.1} s", begin.elapsed().as_secs_f64());
}
