// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Many changes, under traffic.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::process::Serve;
use crate::station::{Ends, Station};

const CHANGES: usize = 1000;
const CLIENTS: usize = 16;

/// Change `index`, and whether it can be.
fn change(index: usize) -> (Value, bool) {
    let request = match index % 8 {
        0 => json!({"command": "rule", "rule": "net2 <> net3", "allow": index.is_multiple_of(16)}),
        1 => json!({"command": "port", "port": "net2", "rate-in": format!("{}K", 1 + index)}),
        2 => {
            json!({"command": "port", "port": "net3", "rate-out": "off", "storm": 1 + index, "link": "up"})
        }
        3 => {
            json!({"command": "link", "device": "net3", "state": if index % 16 < 8 { "down" } else { "up" }})
        }
        4 => json!({"command": "flush", "port": "net2"}),
        5 => json!({"command": "port", "port": "net2", "vlan": 1 + index % 4000}),
        6 => json!({"command": "rule", "rule": format!("x{} > *", index % 100), "allow": true}),
        _ => json!({"command": "port", "port": format!("no{index}"), "link": "up"}),
    };
    (request, index % 8 != 7)
}

/// Whether `answer` is that to change `index`.
fn check(index: usize, answer: &Value) {
    let (request, can_be) = change(index);
    if can_be {
        assert_eq!(answer, &json!({"done": {}}), "{request}");
    } else {
        assert_eq!(answer["error"]["kind"], "not-found", "{request}: {answer}");
        let message = answer["error"]["message"].as_str().expect("words");
        assert!(
            message.contains(&format!("`no{index}`")),
            "{request}: {message}"
        );
    }
}

fn serve() -> Serve {
    let mut args = vec!["--switch", "id=s0,allow=* <> *"];
    for device in [
        "net,id=net0,bus=b0,switch=s0",
        "net,id=net1,bus=b1,switch=s0",
        "net,id=net2,bus=b0,switch=s0",
        "net,id=net3,bus=b1,switch=s0",
    ] {
        args.extend(["--device", device]);
    }
    Serve::start(&args)
}

#[test]
fn a_thousand_changes_under_traffic_are_all_answered_in_order_and_disturb_nobody() {
    let serve = serve();
    let mut one = Station::new(&serve, "b0", 0);
    let mut two = Station::new(&serve, "b1", 0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let talk = scope.spawn(|| {
            let mut pings = 0;
            // Each one waits for its answer: a frame that is lost would be missed.
            while !stop.load(Ordering::Relaxed) {
                one.ping(&mut two);
                pings += 1;
            }
            pings
        });
        let ends = Ends(&stop);
        // One client sends all at once.
        let mut client = serve.ask();
        let mut sending = client.sender();
        scope.spawn(move || {
            for index in 0..CHANGES {
                sending.send(&change(index).0);
            }
        });
        for index in 0..CHANGES {
            check(index, &client.answer());
        }
        // As many as there may be, all at the same time.
        drop(client);
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = serve.ask();
                    for index in 0..CHANGES / CLIENTS {
                        check(index, &client.ask(&change(index).0));
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().expect("all answers");
        }
        drop(ends);
        let pings = talk.join().expect("no frame is lost");
        assert!(pings > 0);
    });
    let drops = |port: &Value| [port["dropped-in"].clone(), port["dropped-out"].clone()];
    for port in ["net0", "net1"] {
        assert_eq!(drops(&serve.port(port)), [json!({}), json!({})], "{port}");
    }
}
