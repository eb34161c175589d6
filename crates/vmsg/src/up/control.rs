// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control socket of a running description: what is the device host's goes there, the rest is done here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::desired::{Desired, GuestState};
use super::host::Host;
use super::plan::{Kind, Plan, SERVE, serve_control};
use super::status::{Ask, PartStatus, Shared, State};
use crate::console;
use crate::control::{Client, Failure, FailureKind, Part, Request, Response, Service};

mod hotplug;

/// How long a part may take to end or to be ready when somebody waits for it.
const PATIENCE: Duration = Duration::from_secs(45);

/// How long the device host may take for an answer: longer than it waits for servers of new devices, so that its own words come first.
const ANSWER: Duration = Duration::from_secs(45);

/// Carries out what operators want.
#[derive(Debug)]
pub(super) struct Operator {
    shared: Shared,
    /// The description's name, which addresses are derived from.
    name: String,
    runtime: PathBuf,
    /// This program.
    program: String,
    desired: Mutex<Desired>,
}

impl Operator {
    pub(super) fn new(plan: &Plan, program: &str, shared: Shared) -> Arc<Self> {
        let serve = plan
            .parts
            .iter()
            .find(|part| matches!(part.kind, Kind::Serve));
        let mut guests = BTreeMap::new();
        for part in &plan.parts {
            if let Kind::Guest(machine) = &part.kind {
                let state = GuestState {
                    machine: (**machine).clone(),
                    buses: machine.buses().to_vec(),
                    plugged: Vec::new(),
                };
                guests.insert(part.name.clone(), state);
            }
        }
        let argv = serve.map_or(&[][..], |part| &part.argv);
        Arc::new(Self {
            shared,
            name: plan.name.clone(),
            runtime: plan.runtime.clone(),
            program: program.to_owned(),
            desired: Mutex::new(Desired {
                host: Host::new(argv),
                buses: plan.buses.clone(),
                guests,
            }),
        })
    }

    /// Also keeps several who change something from doing so at a time.
    fn desired(&self) -> MutexGuard<'_, Desired> {
        self.desired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Once the device host runs, it is to go on with its captures when it is started again. Ends with the supervisor.
    pub(super) fn begin(&self) {
        let ready = |parts: &[PartStatus]| {
            let serve = parts.iter().find(|part| part.name == SERVE)?;
            (serve.state == State::Ready).then_some(())
        };
        if self.shared.wait_change(ready).is_some() {
            // What was changed meanwhile is in it.
            self.tell_argv(&self.desired().host);
        }
    }

    /// Has the device host started as it is meant to be, from now on.
    fn tell_argv(&self, host: &Host) {
        if let Some(argv) = host.argv() {
            // It is there as long as the description runs.
            let _ = self.shared.ask(Ask::SetArgv(SERVE.to_owned(), argv));
        }
    }

    /// Has the device host carry out what lasts.
    fn change(&self, mut request: Request) -> Response {
        // Held, so that changes are made one after another.
        let mut desired = self.desired();
        if let Request::AddUplink { spec } = &mut request {
            let name = || desired.host.uplink_name();
            spec.0.id.get_or_insert_with(name);
        }
        let next = match desired.host.after(&request) {
            Ok(Some(next)) => next,
            Ok(None) => return self.relay(&request),
            Err(why) => {
                let response = self.relay(&request);
                if !matches!(response, Response::Error(_)) {
                    tracing::warn!(?request, why, "this will not be so again");
                }
                return response;
            }
        };
        if !next.argv().is_none_or(|argv| Host::fits(&argv)) {
            let message =
                "the device host could not be started again so: its command line would be too long";
            return Response::error(FailureKind::Refused, message);
        }
        // Before it is carried out: a device host that ends after it has answered comes back with it.
        self.tell_argv(&next);
        let response = self.relay(&request);
        if matches!(response, Response::Error(_)) {
            self.tell_argv(&desired.host);
        } else {
            desired.host = next;
        }
        response
    }

    /// Has the device host answer.
    fn relay(&self, request: &Request) -> Response {
        let Some(serve) = self.shared.part(SERVE) else {
            return Response::error(FailureKind::NotFound, "the description has no devices");
        };
        if serve.state != State::Ready {
            let message = format!("the device host is {}", serve.state.name());
            return Response::error(FailureKind::Unavailable, message);
        }
        let asked = Client::connect(&serve_control(&self.runtime)).and_then(|mut client| {
            client.set_patience(ANSWER)?;
            client.ask(request)
        });
        asked.unwrap_or_else(|error| {
            let message = crate::out::chain(&error);
            Response::error(FailureKind::Unavailable, message)
        })
    }

    fn parts(&self) -> Response {
        let parts = self.shared.parts();
        Response::Parts(parts.into_iter().map(describe).collect())
    }

    fn start_part(&self, name: &str) -> Result<(), Failure> {
        self.shared
            .ask(Ask::Start(name.to_owned()))
            .map_err(refused)?;
        self.wait_ready(name)
    }

    fn restart_part(&self, name: &str) -> Result<(), Failure> {
        let before = self.shared.part(name).and_then(|part| part.pid);
        self.shared
            .ask(Ask::Restart(name.to_owned()))
            .map_err(refused)?;
        let begun = |part: &PartStatus| (part.pid != before || part.state.is_over()).then_some(());
        self.shared
            .wait_part(name, PATIENCE, begun)
            .ok_or_else(|| late(name, "ended"))?;
        self.wait_ready(name)
    }

    fn stop_part(&self, name: &str) -> Result<(), Failure> {
        self.shared
            .ask(Ask::Stop(name.to_owned()))
            .map_err(refused)?;
        let over = |part: &PartStatus| part.state.is_over().then_some(());
        self.shared
            .wait_part(name, PATIENCE, over)
            .ok_or_else(|| late(name, "ended"))
    }

    /// Waits until a part that is being started is ready, or has failed.
    fn wait_ready(&self, name: &str) -> Result<(), Failure> {
        let settled = |part: &PartStatus| match part.state {
            State::Ready => Some(Ok(())),
            state if state.is_over() || state == State::Pausing => {
                let note = part.note.clone().unwrap_or_default();
                Some(Err(refused(format!("`{name}` {note}"))))
            }
            _ => None,
        };
        self.shared
            .wait_part(name, PATIENCE, settled)
            .ok_or_else(|| late(name, "ready"))?
    }

    /// Consoles of guests that are serial lines, and those that are devices.
    fn consoles(&self) -> Response {
        let mut answer = console::control::list(&self.shared.consoles);
        if let (Response::Consoles(all), Response::Consoles(devices)) =
            (&mut answer, self.relay(&Request::Consoles {}))
        {
            all.extend(devices);
        }
        answer
    }
}

fn describe(part: PartStatus) -> Part {
    let since = part
        .since
        .map(|since| Instant::now().saturating_duration_since(since));
    Part {
        name: part.name,
        kind: part.kind.to_owned(),
        state: part.state.name().to_owned(),
        pid: part.pid,
        restarts: part.restarts,
        uptime_ms: since.map(|since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
        log: part.log,
        note: part.note,
    }
}

fn refused(why: impl ToString) -> Failure {
    Failure::new(FailureKind::Refused, why)
}

fn late(part: &str, what: &str) -> Failure {
    let message = format!("`{part}` is not {what} after {} s", PATIENCE.as_secs());
    Failure::new(FailureKind::Unavailable, message)
}

impl Service for Operator {
    fn carry_out(&self, request: Request) -> Response {
        let done = |result: Result<(), Failure>| match result {
            Ok(()) => Response::Done {},
            Err(failure) => failure.into(),
        };
        match &request {
            Request::Parts {} => self.parts(),
            Request::StartPart { part } => done(self.start_part(part)),
            Request::StopPart { part } => done(self.stop_part(part)),
            Request::RestartPart { part } => done(self.restart_part(part)),
            Request::AddDevice { spec, guest } => {
                match self.add_device(&spec.0, guest.as_deref()) {
                    Ok(added) => Response::Added(added),
                    Err(failure) => failure.into(),
                }
            }
            Request::RemoveDevice { device, bus } => {
                done(self.remove_device(device, bus.as_deref()))
            }
            Request::Consoles {} => self.consoles(),
            Request::ConsoleLog { console, file }
                if self.shared.consoles.find(console).is_some() =>
            {
                console::control::log(&self.shared.consoles, console, file.as_deref())
            }
            Request::ConsoleSize {
                console,
                cols,
                rows,
            } if self.shared.consoles.find(console).is_some() => {
                console::control::size(&self.shared.consoles, console, *cols, *rows)
            }
            Request::ConsoleLog { .. } | Request::ConsoleSize { .. } => self.relay(&request),
            Request::List {} | Request::Switches {} | Request::Macs { .. } => self.relay(&request),
            _ => self.change(request),
        }
    }
}
