// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::BusSpec;

fn parse(text: &str) -> Result<BusSpec, String> {
    text.parse()
        .map_err(|error: keyval::Error| error.to_string())
}

#[test]
fn what_is_said_comes_back_as_it_was_said() {
    for text in [
        "ivshmem,socket=/run/iv.sock",
        "ivshmem,listen=/run/iv.sock,shm=iv,size=0x100000,vectors=4,layout=spsc",
        "ivshmem,pci=0000:00:04.0,offset=0x2000,peer=3,vector=1",
        "ivshmem,file=/dev/shm/iv,layout=amp-pci",
        "ivshmem,socket=a,message-size=264,memory=segment,ram=pci:0000:00:05.0,ram-offset=0x1000,ram-size=0x2000,window=0x100000000+0x2000",
        "ivshmem,socket=a,memory=known,ram=ram,mem-offset=0x40000000,mem-low-size=0x1000,mem-hole=0x2000",
        "ivshmem,socket=a,memory=bounce,ram=bar,ram-offset=0x10000,trace=t.pcapng",
        "ivshmem,socket=a,memory=segment,node=1",
    ] {
        let spec = parse(text).unwrap();
        assert_eq!(spec.to_string(), text);
        assert_eq!(parse(&spec.to_string()), Ok(spec));
    }
    assert_eq!(
        parse("ivshmem,socket=a,memory=segment,window=4G+1G")
            .unwrap()
            .to_string(),
        "ivshmem,socket=a,memory=segment,window=0x100000000+0x40000000"
    );
}

#[test]
fn what_contradicts_is_refused_by_name() {
    for (text, names) in [
        ("ivshmem", "socket="),
        ("ivshmem,socket=a,pci=auto", "pci="),
        ("ivshmem,socket=a,shm=b", "shm="),
        ("ivshmem,listen=a,shm=b,file=c", "file="),
        ("ivshmem,socket=a,size=1M", "size="),
        ("ivshmem,socket=a,vectors=2", "vectors="),
        ("ivshmem,file=a,peer=1", "peer="),
        ("ivshmem,socket=a,offset=100", "offset="),
        (
            "ivshmem,socket=a,layout=spsc,message-size=128",
            "message-size=",
        ),
        ("ivshmem,socket=a,layout=ring", "amp-pci"),
        ("ivshmem,socket=a,soket=b", "soket"),
        ("ivshmem,socket=a,ram=bar", "memory="),
        ("ivshmem,socket=a,ram-size=1M", "ram-size="),
        ("ivshmem,socket=a,memory=bounce", "ram="),
        ("ivshmem,socket=a,memory=known,ram=bar", "known"),
        (
            "ivshmem,socket=a,memory=segment,mem-offset=1",
            "mem-offset=",
        ),
        (
            "ivshmem,socket=a,memory=known,ram=x,mem-hole=1",
            "mem-low-size=",
        ),
        (
            "ivshmem,socket=a,memory=segment,node=1,window=0+1G",
            "window=",
        ),
        ("ivshmem,socket=a,memory=bounce,ram=x,node=1", "node="),
        (
            "ivshmem,socket=a,memory=segment,ram=pci:../x",
            "PCI address",
        ),
        ("ivshmem,socket=a,memory=segment,window=1G", "BASE+SIZE"),
        ("ivshmem,pci=../../etc", "pci="),
        ("ivshmem,file=a,memory=bounce,ram=a", "ram=bar"),
        ("ivshmem,shm=/a,memory=segment,ram=/dev/shm/a", "ram=bar"),
        (
            "ivshmem,listen=s,shm=a,memory=bounce,ram=/dev/shm/a,ram-offset=1M",
            "ram=bar",
        ),
        (
            "ivshmem,pci=0000:00:04.0,memory=bounce,ram=pci:0000:00:04.0",
            "ram=bar",
        ),
        (
            "ivshmem,socket=a,memory=bounce,ram=bar,ram-offset=4096",
            "ram-offset=0x1000",
        ),
        (
            "ivshmem,socket=a,offset=1M,memory=bounce,ram=bar,ram-offset=0,ram-size=1M",
            "0xfff80",
        ),
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.contains(names), "{text}: {error}");
    }
}

#[test]
fn common_memory_may_lie_before_the_messages_or_behind_them() {
    for text in [
        "ivshmem,socket=a,offset=1M,memory=bounce,ram=bar,ram-offset=0,ram-size=512K",
        "ivshmem,socket=a,memory=bounce,ram=bar,ram-offset=64K",
        "ivshmem,file=a,memory=known,ram=a",
    ] {
        assert!(parse(text).is_ok(), "{text}");
    }
}

#[test]
fn ends_that_were_told_different_modes_are_named_with_both() {
    use MemoryMode::{Bounce, Known, Segment, Whole};
    for (code, mode) in [(1, Known), (2, Whole), (3, Segment), (4, Bounce)] {
        assert_eq!(mode.code(), code);
        assert_eq!(MemoryMode::from_code(code), Some(mode));
    }
    assert_eq!(MemoryMode::from_code(0), None);
    assert_eq!(MemoryMode::from_code(5), None);

    assert_eq!(modes_differ(Some(Bounce), Some(Bounce), true), None);
    // Who only looks is told nothing.
    assert_eq!(modes_differ(Some(Bounce), None, false), None);
    assert_eq!(modes_differ(None, Some(Bounce), true), None);
    let text = modes_differ(Some(Bounce), None, true).expect("a difference");
    assert_eq!(modes_differ(None, Some(Bounce), false), Some(text.clone()));
    assert!(
        text.contains("memory=bounce") && text.contains("nothing"),
        "{text}"
    );
    let text = modes_differ(Some(Segment), Some(Bounce), false).expect("a difference");
    assert!(
        text.contains("driver's side was told memory=bounce")
            && text.contains("device host memory=segment"),
        "{text}"
    );
}
