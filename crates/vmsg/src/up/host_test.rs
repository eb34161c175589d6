// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

/// A device host with a switch, two devices on it, a way out, and a device that is on none.
fn host() -> Host {
    let argv = [
        "vmsg",
        "serve",
        "--control",
        "c",
        "--bus",
        "unix,path=b",
        "--switch",
        "id=s0,unknown=up,allow=* <> *,deny=a > up,table=99",
        "--port",
        "id=a,pin=on,rate-in=1M",
        "--uplink",
        "id=up,switch=s0,backend=tap,ifname=t0",
        "--device",
        "net,id=a,switch=s0,mtu=9000",
        "--device",
        "net,id=b,switch=s0,pcap=b.pcap",
        "--device",
        "rng,id=rng0",
    ];
    Host::new(&argv.map(str::to_owned))
}

/// The host after these requests.
fn after(host: &Host, requests: &[&str]) -> Host {
    requests.iter().fold(host.clone(), |host, line| {
        let request = serde_json::from_str(line).expect("a request");
        let next = host.after(&request).expect("it is known what that is");
        next.expect("it lasts")
    })
}

fn refused(host: &Host, line: &str) -> String {
    let request = serde_json::from_str(line).expect("a request");
    host.after(&request).expect_err("it is not known")
}

/// The value of the option `name` that has `id=`.
fn option(host: &Host, name: &str, id: &str) -> Option<String> {
    let argv = host.argv().expect("there is a device host");
    let wanted = format!("id={id}");
    let mut pairs = argv[2..].chunks_exact(2);
    let found = pairs.find(|pair| pair[0] == name && pair[1].split(',').any(|item| item == wanted));
    found.map(|pair| pair[1].clone())
}

#[test]
fn rules_keep_their_order_and_a_newer_one_for_the_same_ports_takes_the_place_of_the_older() {
    let rule = |rule: &str, allow: bool| {
        format!(r#"{{"command":"rule","rule":"{rule}","allow":{allow}}}"#)
    };
    let cut = after(&host(), &[&rule("a <> b", false), &rule("a > up", true)]);
    let text = option(&cut, "--switch", "s0").expect("it is there");
    assert_eq!(
        text,
        "id=s0,unknown=up,table=99,rule=+* > *,rule=-a > b,rule=-b > a,rule=+a > up"
    );
    // What is said there is what the switch had.
    let spec: SwitchSpec = keyval::from_str(&text).expect("it can be read");
    let allowed: Vec<bool> = spec
        .config()
        .expect("rules")
        .rules
        .iter()
        .map(|r| r.allow)
        .collect();
    assert_eq!(allowed, [true, false, false, true]);
    let healed = after(&cut, &[r#"{"command":"remove-rule","rule":"b <> a"}"#]);
    let text = option(&healed, "--switch", "s0").expect("it is there");
    assert_eq!(text, "id=s0,unknown=up,table=99,rule=+* > *,rule=+a > up");
}

#[test]
fn a_port_is_as_it_was_described_but_for_what_was_changed_and_its_capture_goes_on() {
    let changed = after(
        &host(),
        &[
            r#"{"command":"port","port":"a","rate-in":"off","vlan":7}"#,
            r#"{"command":"port","port":"a","storm":3}"#,
            r#"{"command":"capture","port":"a","file":"a.pcap"}"#,
            r#"{"command":"port","port":"up","link":"down"}"#,
        ],
    );
    let text = |name: &str, id: &str| option(&changed, name, id).expect("it is there");
    assert_eq!(
        text("--port", "a"),
        "id=a,switch=s0,vlan=7,pin=on,storm=3,capture=a.pcap,capture-append=on"
    );
    assert_eq!(text("--port", "up"), "id=up,switch=s0,link=down");
    // What a device records is its port's, and goes on, too; until somebody ends it.
    assert_eq!(
        text("--port", "b"),
        "id=b,switch=s0,capture=b.pcap,capture-append=on"
    );
    assert_eq!(text("--device", "b"), "net,id=b,switch=s0");
    let ended = after(&changed, &[r#"{"command":"capture","port":"b"}"#]);
    assert_eq!(
        option(&ended, "--port", "b").expect("it is there"),
        "id=b,switch=s0"
    );
    assert_eq!(text("--device", "a"), "net,id=a,switch=s0,mtu=9000");
}

#[test]
fn a_cable_is_that_of_the_device_or_of_the_uplink() {
    let link = |id: &str| format!(r#"{{"command":"link","device":"{id}","state":"down"}}"#);
    let cut = after(&host(), &[&link("b"), &link("up")]);
    let device = option(&cut, "--device", "b").expect("it is there");
    assert!(device.contains("link=down"), "{device}");
    let port = option(&cut, "--port", "up").expect("it is there");
    assert!(port.contains("link=down"), "{port}");
}

#[test]
fn who_is_gone_takes_along_what_was_changed_about_it() {
    let mut host = after(
        &host(),
        &[
            r#"{"command":"port","port":"a","vlan":7}"#,
            r#"{"command":"link","device":"b","state":"down"}"#,
            r#"{"command":"remove-uplink","uplink":"up"}"#,
        ],
    );
    // Frames to an uplink that is not there are dropped, and a command line that names one is refused.
    let switch = option(&host, "--switch", "s0").expect("it is there");
    assert!(switch.contains("unknown=drop"), "{switch}");
    assert_eq!(option(&host, "--uplink", "up"), None);
    host.remove_device("a");
    host.remove_device("b");
    assert!(!host.has_device("a") && host.has_device("rng0"));
    host.add("--device", "net,id=a,switch=s0".to_owned());
    host.add("--device", "net,id=b,switch=s0".to_owned());
    let port = option(&host, "--port", "a").expect("it was described");
    assert_eq!(port, "id=a,pin=on,rate-in=1M");
    assert_eq!(
        option(&host, "--device", "b").expect("it is there"),
        "net,id=b,switch=s0"
    );
    let again = after(
        &host,
        &[r#"{"command":"add-uplink","spec":"id=up,switch=s0,backend=tap,ifname=t1"}"#],
    );
    let switch = option(&again, "--switch", "s0").expect("it is there");
    assert!(switch.contains("unknown=up"), "{switch}");
}

#[test]
fn ports_are_described_and_forgotten() {
    let described = after(
        &host(),
        &[r#"{"command":"add-port","spec":"id=c,switch=s0,vlan=7"}"#],
    );
    assert!(option(&described, "--port", "c").is_some());
    let forgotten = after(&described, &[r#"{"command":"remove-port","port":"c"}"#]);
    assert_eq!(option(&forgotten, "--port", "c"), None);
    assert!(option(&forgotten, "--port", "a").is_some());
}

#[test]
fn what_cannot_be_is_in_no_command_line() {
    let host = host();
    for line in [
        r#"{"command":"port","port":"a","vlan":5000}"#,
        r#"{"command":"port","port":"up","pin":"on"}"#,
        r#"{"command":"port","port":"nobody","vlan":5}"#,
        r#"{"command":"rule","rule":"a","allow":true}"#,
        r#"{"command":"rule","switch":"s1","rule":"a > b","allow":true}"#,
        r#"{"command":"remove-uplink","uplink":"a9"}"#,
    ] {
        refused(&host, line);
    }
    let list = serde_json::from_str(r#"{"command":"list"}"#).expect("a request");
    assert!(host.after(&list).expect("it is known").is_none());
    assert!(Host::new(&[]).argv().is_none());
    assert_eq!(host.uplink_name(), "up0");
}

#[test]
fn a_command_line_has_an_end() {
    let argv = host().argv().expect("there is a device host");
    assert!(Host::fits(&argv));
    let mut long = argv.clone();
    long.push("x".repeat(LONGEST + 1));
    assert!(!Host::fits(&long));
    let mut many = argv;
    many.extend(vec!["x".repeat(LONGEST); 60]);
    assert!(!Host::fits(&many));
}
