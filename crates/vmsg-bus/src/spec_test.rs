// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn unix(spec: &str) -> UnixSpec {
    match spec.parse() {
        Ok(BusSpec::Unix(unix)) => unix,
        other => panic!("{other:?}"),
    }
}

fn refused(spec: &str) -> String {
    spec.parse::<BusSpec>().unwrap_err().to_string()
}

#[test]
fn a_bus_is_named_as_in_the_documentation() {
    let unix = unix("unix,path=b0.sock,message-size=264,mode=0660");
    assert_eq!(unix.path, PathBuf::from("b0.sock"));
    assert_eq!(unix.message_size.map(MessageSize::get), Some(264));
    assert_eq!(unix.mode, Some(Mode(0o660)));
    assert_eq!((unix.slots, unix.max_connections), (None, None));
}

#[test]
fn what_is_printed_can_be_read_again() {
    for spec in [
        "unix,path=b0.sock",
        "unix,path=a,,b.sock,message-size=48,slots=2,max-connections=7,mode=0600",
        "unix,path=b0.sock,mode=0600,trace=a,,b.pcapng",
        "linux-user",
        "linux-user,name=a,dir=/tmp/a,,b,socket=s,server=off,ram=/dev/shm/ram,mem-offset=0x0,mem-low-size=0x80000000,mem-hole=0x10000000,revision=r1,trace=t",
    ] {
        assert_eq!(spec.parse::<BusSpec>().unwrap().to_string(), spec);
    }
}

#[test]
fn toml_says_the_same() {
    #[derive(Deserialize)]
    struct File {
        bus: Vec<BusSpec>,
    }
    let file: File =
        toml::from_str("[[bus]]\nunix = { path = 'b0.sock', message-size = 264, mode = '0660' }")
            .unwrap();
    assert_eq!(
        file.bus,
        ["unix,path=b0.sock,message-size=264,mode=660"
            .parse()
            .unwrap()]
    );
}

#[test]
fn mistakes_are_named() {
    assert_eq!(
        refused("unix,pth=b0.sock"),
        "unknown key `pth`, known: `path`, `message-size`, `slots`, `max-connections`, `mode`, `trace`; did you mean `path`?"
    );
    assert_eq!(refused("unix"), "`path=…` is missing");
    let mut names = "`unix`".to_owned();
    if cfg!(feature = "linux-user") {
        names += ", `linux-user`";
    }
    if cfg!(feature = "ivshmem") {
        names += ", `ivshmem`";
    }
    assert_eq!(
        refused("path=b0.sock"),
        format!("the first item must be one of {names}")
    );
    assert_eq!(
        refused("tcp,path=b0.sock"),
        format!("unknown name `tcp`, known: {names}")
    );
    assert_eq!(
        refused("unix,path=x,message-size=40"),
        "`message-size=40`: the message size must be 48 to 65536 bytes"
    );
    assert_eq!(
        refused("unix,path=x,mode=rw"),
        "`mode=rw`: expected permissions in octal such as 0660, not `rw`"
    );
    assert!(refused("unix,path=x,mode=4777").contains("octal"));
}

#[cfg(feature = "unix")]
#[test]
fn the_options_of_a_listener_come_from_the_spec() {
    let unix = unix("unix,path=x,message-size=64,slots=9,max-connections=3,mode=0666");
    let options = unix.listener_options("host");
    assert_eq!(options.capabilities.max_message_size, 64);
    assert_eq!(
        (options.slots, options.max_connections, options.mode),
        (9, 3, 0o666)
    );
    assert_eq!(options.name, "host");
}

#[cfg(feature = "linux-user")]
#[test]
fn a_linux_user_bus_is_as_qemu_has_it_unless_said_otherwise() {
    use crate::linux_user::Revision;
    let read = |text: &str| match text.parse() {
        Ok(BusSpec::LinuxUser(spec)) => spec,
        other => panic!("{other:?}"),
    };
    let plain = read("linux-user");
    assert_eq!(plain.name.as_str(), "linux-user");
    assert_eq!(plain.socket_path(), PathBuf::from("./linux-user.socket"));
    assert_eq!((plain.mem_offset, plain.mem_hole), (0x4000_0000, 0));
    assert_eq!((plain.server, plain.revision), (None, Revision::One));
    assert!(plain.static_ram().is_none());
    let spec = read("linux-user,ram=r,mem-low-size=2G,mem-hole=1G,mem-offset=0,revision=1");
    assert_eq!((spec.mem_low_size, spec.mem_hole), (2 << 30, 1 << 30));
    assert_eq!(spec.static_ram().unwrap().path(), Path::new("r"));
    for wrong in [
        "name=a/b",
        "name=",
        "revision=2",
        "server=maybe",
        "mem-offset=x",
    ] {
        assert!(
            refused(&format!("linux-user,{wrong}")).contains(wrong),
            "{wrong}"
        );
    }
}
