// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::mpsc;

use super::*;

const SOON: Duration = Duration::from_secs(60);

/// A QEMU's side of the connection.
struct Fake(BufReader<UnixStream>);

impl Fake {
    /// Greets, and takes the answer to that.
    fn start() -> (Qmp, Self, mpsc::Receiver<String>) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let (tell, told) = mpsc::channel();
        let qmp = Qmp::start(ours, move |name| {
            let _ = tell.send(name.to_owned());
        })
        .expect("a thread");
        let mut fake = Self(BufReader::new(theirs));
        fake.say(&json!({ "QMP": { "version": {}, "capabilities": [] } }));
        let asked = fake.hear();
        assert_eq!(asked["execute"], "qmp_capabilities");
        fake.say(&json!({ "return": {}, "id": asked["id"] }));
        assert_eq!(told.recv_timeout(SOON).as_deref(), Ok("READY"));
        (qmp, fake, told)
    }

    fn say(&mut self, line: &Value) {
        writeln!(self.0.get_mut(), "{line}").expect("it is read");
    }

    fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line");
        serde_json::from_str(&line).expect("JSON")
    }
}

#[test]
fn commands_have_answers_and_events_come_between() {
    let (qmp, mut fake, told) = Fake::start();
    let asking = std::thread::spawn({
        let qmp = qmp.clone();
        move || qmp.execute("device_del", json!({ "id": "dev-net0" }), SOON)
    });
    let asked = fake.hear();
    assert_eq!(asked["arguments"]["id"], "dev-net0");
    fake.say(&json!({ "event": "DEVICE_DELETED", "data": { "device": "dev-net0" } }));
    fake.say(&json!({ "return": { "x": 1 }, "id": asked["id"] }));
    assert_eq!(asking.join().expect("no panic").expect("an answer")["x"], 1);
    let picked = qmp.event(0, SOON, |name, data| {
        (name == "DEVICE_DELETED").then(|| data["device"].clone())
    });
    assert_eq!(picked.expect("it came"), "dev-net0");
    assert_eq!(told.recv_timeout(SOON).as_deref(), Ok("DEVICE_DELETED"));
    let late = qmp.event(qmp.events(), Duration::from_millis(1), |_, _| Some(()));
    assert!(matches!(late, Err(QmpError::Late(_))));
}

#[test]
fn a_refusal_has_its_reason_and_silence_an_end() {
    let (qmp, mut fake, _told) = Fake::start();
    let asking = std::thread::spawn({
        let qmp = qmp.clone();
        move || qmp.execute("x", Value::Null, SOON)
    });
    let asked = fake.hear();
    fake.say(
        &json!({ "error": { "class": "GenericError", "desc": "no such" }, "id": asked["id"] }),
    );
    let error = asking.join().expect("no panic").expect_err("refused");
    assert_eq!(error.to_string(), "QEMU refuses x: no such");
    let error = qmp.execute("y", Value::Null, Duration::from_millis(1));
    assert_eq!(
        error.expect_err("late").to_string(),
        "QEMU has not answered y in time"
    );
}

#[test]
fn what_makes_no_sense_ends_the_connection_and_nothing_else() {
    for nonsense in [
        &b"\xff\n"[..],
        b"{\"id\":0,\"error\":{}}\n",
        b"{\"id\":3}\n",
        &[b'['; 100_000],
    ] {
        let (qmp, mut fake, told) = Fake::start();
        let _ = fake.0.get_mut().write_all(nonsense);
        let _ = fake.0.get_mut().write_all(b"\n");
        assert_eq!(told.recv_timeout(SOON).as_deref(), Ok("GONE"));
        let error = qmp.execute("x", Value::Null, SOON).expect_err("it is gone");
        assert!(matches!(error, QmpError::Gone), "{error}");
    }
}

#[test]
fn events_that_nobody_waits_for_are_not_kept_for_ever() {
    let (qmp, mut fake, told) = Fake::start();
    for number in 0..10 * MAX_EVENTS {
        fake.say(&json!({ "event": "RTC_CHANGE", "data": { "n": number } }));
    }
    for _ in 0..10 * MAX_EVENTS {
        told.recv_timeout(SOON).expect("each is told");
    }
    assert_eq!(qmp.shared.heard().events.len(), MAX_EVENTS);
}

#[test]
fn answers_that_nobody_waits_for_and_events_of_any_length_are_not_kept() {
    let (qmp, mut fake, told) = Fake::start();
    let asking = std::thread::spawn({
        let qmp = qmp.clone();
        move || qmp.execute("x", Value::Null, SOON)
    });
    let asked = fake.hear();
    for n in 0..1000 {
        fake.say(&json!({ "return": { "n": n }, "id": asked["id"] }));
        fake.say(&json!({ "return": {}, "id": 77 }));
    }
    assert_eq!(asking.join().expect("no panic").expect("an answer")["n"], 0);
    // Words that are ours are not told as if they were.
    fake.say(&json!({ "event": "GONE" }));
    fake.say(&json!({ "event": "READY" }));
    for _ in 0..4 {
        fake.say(&json!({ "event": "LONG", "data": "x".repeat(100_000) }));
    }
    for _ in 0..4 {
        assert_eq!(told.recv_timeout(SOON).as_deref(), Ok("LONG"));
    }
    let heard = qmp.shared.heard();
    assert!(heard.answers.is_empty() && heard.waiting.is_empty());
    assert_eq!(heard.events.len(), 2);
}
