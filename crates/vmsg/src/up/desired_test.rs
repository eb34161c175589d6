// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::control::LinkState;

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn desired() -> Desired {
    let argv =
        words("vmsg serve --control c --bus unix,path=b --device net,id=net0 --device rng,id=rng0");
    Desired::new(&argv, Vec::new(), BTreeMap::new())
}

fn read(line: &str) -> Request {
    serde_json::from_str(line).expect("a request")
}

#[test]
fn a_device_host_starts_with_what_was_added_and_without_what_was_removed() {
    let mut desired = desired();
    assert!(desired.has_device("net0"));
    desired.remove("--device", "net0");
    desired.add("--device", "net,id=net1".to_owned());
    desired.changed(&read(
        r#"{"command":"add-port","spec":"id=net1,switch=s0,vlan=7"}"#,
    ));
    let argv = desired.serve_argv().expect("there is a device host");
    assert_eq!(
        argv.join(" "),
        "vmsg serve --control c --bus unix,path=b --device rng,id=rng0 --device net,id=net1 --port id=net1,switch=s0,vlan=7"
    );
    assert!(!desired.has_device("net0"));
    desired.changed(&read(r#"{"command":"remove-port","port":"net1"}"#));
    assert!(
        !desired
            .serve_argv()
            .expect("it is there")
            .join(" ")
            .contains("--port")
    );
    assert_eq!(
        Desired::new(&[], Vec::new(), BTreeMap::new()).serve_argv(),
        None
    );
}

#[test]
fn the_last_change_about_a_thing_counts_and_others_stay_in_order() {
    let mut desired = desired();
    let link = |state| Request::Link {
        device: "net0".to_owned(),
        bus: None,
        state,
    };
    let cut = read(r#"{"command":"rule","rule":"a <> b","allow":false}"#);
    desired.changed(&link(LinkState::Down));
    desired.changed(&cut);
    desired.changed(&read(r#"{"command":"list"}"#));
    desired.changed(&read(r#"{"command":"announce","device":"net0"}"#));
    desired.changed(&link(LinkState::Up));
    assert_eq!(desired.changes(), [cut.clone(), link(LinkState::Up)]);
    let healed = read(r#"{"command":"remove-rule","rule":"a <> b"}"#);
    desired.changed(&healed);
    assert_eq!(desired.changes(), [link(LinkState::Up), healed.clone()]);
    desired.forget("net0");
    assert_eq!(desired.changes(), [healed]);
}
