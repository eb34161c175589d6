// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn a_bus_is_called_as_its_socket() {
    let buses =
        parse_all(&texts(&["unix,path=/run/b0.sock", "unix,path=car.front"])).expect("two buses");
    assert_eq!(find(&buses, None).expect("the first"), 0);
    assert_eq!(find(&buses, Some("car")).expect("the second"), 1);
    let named = parse_all(&texts(&["linux-user,socket=a.sock,name=q"])).expect("a bus");
    assert_eq!(find(&named, Some("q")).expect("by its name"), 0);
    let error = find(&buses, Some("x")).expect_err("unknown").to_string();
    assert!(error.contains("b0, car"), "{error}");
}

#[test]
fn two_buses_need_two_names() {
    let error = |buses: &[&str]| match parse_all(&texts(buses)) {
        Err(Usage(error)) => error,
        Ok(buses) => panic!("{buses:?}"),
    };
    let unix = error(&["unix,path=a/b0.sock", "unix,path=c/b0.sock"]);
    assert!(unix.contains("different names"), "{unix}");
    assert!(!unix.contains("name="), "there is no such key: {unix}");
    assert!(error(&["linux-user", "linux-user,dir=a"]).contains("name="));
    assert!(parse_all(&texts(&["unix"])).is_err());
    assert!(parse_all(&texts(&["unix,path=/"])).is_err());
}

#[test]
fn what_one_side_of_an_ivshmem_bus_cannot_do_is_said_at_once() {
    let error = |result: Result<(), Usage>| match result {
        Err(Usage(error)) => error,
        Ok(()) => panic!("that is no use to anybody"),
    };
    let guests = |text: &str| for_guests(text, &parse(text).expect("a bus"));
    assert!(error(guests("ivshmem,listen=a,memory=bounce,ram=bar")).contains("socket="));
    assert!(error(guests("ivshmem,socket=a")).contains("memory=bounce,ram=bar"));
    assert!(error(guests("ivshmem,socket=a,memory=segment")).contains("node="));
    assert!(guests("ivshmem,socket=a,memory=segment,node=1").is_ok());
    assert!(guests("ivshmem,socket=a,memory=whole").is_ok());
    let look = |text: &str| for_driver(text, &parse(text).expect("a bus"));
    assert!(error(look("ivshmem,listen=a")).contains("socket="));
    assert!(look("ivshmem,socket=a").is_ok() && look("unix,path=a").is_ok());

    let devices = |text: &str| {
        let texts = texts(&[text]);
        let mut buses = parse_all(&texts).expect("a bus");
        for_devices(&texts, &mut buses).map(|()| buses.remove(0).spec)
    };
    for mode in ["whole", "segment", "known"] {
        let text = format!("ivshmem,socket=a,memory={mode}");
        assert!(error(devices(&text).map(drop)).contains("ram="), "{mode}");
    }
    let size = |text: &str| match devices(text) {
        Ok(BusSpec::Ivshmem(bus)) => bus.size,
        _ => panic!("{text}"),
    };
    assert_eq!(size("ivshmem,listen=a"), None);
    let bounce = "ivshmem,listen=a,memory=bounce,ram=bar";
    assert_eq!(size(bounce), Some(32 << 20));
    assert_eq!(size(&format!("{bounce},size=4M")), Some(4 << 20));
    assert_eq!(size(&format!("{bounce},ram-size=64M")), Some(128 << 20));
}

#[test]
fn a_hole_in_memory_has_a_place_and_a_size() {
    for half in ["mem-low-size=2G", "mem-hole=2G"] {
        let Err(Usage(error)) = parse(&format!("linux-user,{half}")) else {
            panic!("{half} alone says nothing");
        };
        assert!(error.contains("mem-hole=") && error.contains("mem-low-size="));
    }
    assert!(parse("linux-user,mem-low-size=2G,mem-hole=2G").is_ok());
}

#[test]
fn a_bus_with_an_id_is_called_by_it() {
    let texts = [
        "unix,path=/a/b0.sock,id=first",
        "unix,path=/b/b0.sock,id=b1",
    ];
    let buses = parse_all(&texts.map(str::to_owned)).expect("different names");
    assert_eq!(buses[0].name, "first");
    assert_eq!(find(&buses, Some("b1")).ok(), Some(1));
    let same = ["unix,path=/a,id=x", "unix,path=/b,id=x"].map(str::to_owned);
    let error = parse_all(&same).expect_err("refused").to_string();
    assert!(error.contains("set another id="), "{error}");
    for bad in [
        "unix,path=/a,id=",
        "unix,path=/a,id=a/b",
        "unix,path=/a,id",
        "unix,path=/a,idd=a",
    ] {
        parse(bad).expect_err(bad);
    }
}
