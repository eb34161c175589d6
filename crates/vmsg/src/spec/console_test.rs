// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;
use crate::spec::DeviceSpec;

fn console(text: &str) -> ConsoleSpec {
    match vmsg_bus::keyval::from_str(text).expect("a valid specification") {
        DeviceSpec::Console(console) => *console,
        _ => panic!("not a console"),
    }
}

#[test]
fn a_console_alone_has_two_queues_and_one_socket() {
    let spec = console("console,id=con0,log=con0.log");
    spec.check("con0").expect("valid");
    assert_eq!(spec.queues(), 2);
    assert_eq!(spec.settings(), Settings::default());
    let control = Path::new("c.sock");
    let [hub] = &spec.hubs("con0", Some(control))[..] else {
        panic!("one hub");
    };
    assert_eq!(
        hub.socket.as_deref(),
        Some(Path::new("c.sock.con0.console"))
    );
    assert_eq!(hub.log.as_deref(), Some(Path::new("con0.log")));
    assert_eq!(spec.hubs("con0", None)[0].socket, None);
}

#[test]
fn ports_have_sockets_beside_that_of_the_console() {
    let spec = console("console,path=x.sock,port=a,port=b,size-order=rows-first");
    spec.check("console0").expect("valid");
    assert_eq!(spec.queues(), 8);
    let hubs = spec.hubs("console0", Some(Path::new("c.sock")));
    let names: Vec<_> = hubs.iter().map(|hub| hub.name.as_str()).collect();
    assert_eq!(names, ["console0", "console0:a", "console0:b"]);
    let sockets = hubs.iter().filter_map(|hub| hub.socket.as_deref());
    let sockets: Vec<_> = sockets.map(|path| path.display().to_string()).collect();
    assert_eq!(sockets, ["x.sock", "x.sock.a", "x.sock.b"]);
    assert_eq!(
        console("console,port=a").hubs("con", Some(Path::new("c")))[1]
            .socket
            .as_deref(),
        Some(Path::new("c.con.a.console"))
    );
}

#[test]
fn what_cannot_be_is_named() {
    for (text, id, words) in [
        ("console,port=a/b", "con0", "port=a/b"),
        ("console,port=a,port=a", "con0", "twice"),
        ("console,port=a,multiport=off", "con0", "multiport=off"),
        ("console,size-order=rows-first", "con0", "size-order="),
        ("console", "con 0", "id=con 0"),
    ] {
        let Usage(error) = console(text).check(id).expect_err(text);
        assert!(error.contains(words), "{error}");
    }
    let many = (0..31).map(|port| format!(",port=p{port}"));
    let many = format!("console{}", many.collect::<String>());
    assert!(console(&many).check("con0").is_err());
}
