// SPDX-License-Identifier: Apache-2.0 OR MIT

use vmsg_bus::keyval;

use super::*;
use crate::spec::DeviceSpec;

fn blk(text: &str) -> BlkSpec {
    match keyval::from_str(text).expect("a valid specification") {
        DeviceSpec::Blk(blk) => *blk,
        other => panic!("{other:?}"),
    }
}

#[test]
fn all_keys_are_read_and_written_again() {
    let text = "blk,id=d,num=3,bus=b,worker=1,path=/a,format=qcow2,ro=on,serial=X,cache=none,queues=4,discard=off,backing=on";
    let spec = blk(text);
    spec.check().expect("fine");
    assert!(spec.ro && spec.backing && spec.is_direct());
    let settings = spec.settings("d");
    assert_eq!(
        (settings.serial.as_str(), settings.queues, settings.discard),
        ("X", 4, false)
    );
    assert!(
        settings.write_back,
        "flushes are needed past the page cache, too"
    );
    let again = keyval::to_string(&DeviceSpec::Blk(Box::new(spec))).expect("written");
    assert_eq!(again, text);
    let spec = blk("blk,path=/a,cache=writethrough,engine=threads,block-size=4K");
    spec.check().expect("fine");
    assert!(!spec.settings("blk0").write_back);
    assert_eq!(spec.settings("blk0").serial, "blk0");
    assert_eq!(spec.block_size, Some(4096));
    assert!(matches!(
        spec.store(),
        Ok(Store::File {
            engine: DiskEngine::Threads,
            ..
        })
    ));
    let spec = blk("blk,path=nbd+unix:///x?socket=/s,ro");
    assert!(matches!(spec.store(), Ok(Store::Nbd(_))));
}

#[test]
fn a_file_that_looks_like_an_image_needs_a_format() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image");
    std::fs::write(&image, b"QFI\xfb\0\0\0\x03").expect("written");
    let spec = blk("blk,path=x");
    let error = spec.check_format(&image).expect_err("refused");
    for word in ["format=qcow2", "format=raw"] {
        assert!(error.0.contains(word), "{}", error.0);
    }
    for given in ["blk,path=x,format=raw", "blk,path=x,format=qcow2"] {
        blk(given).check_format(&image).expect("said");
    }
    let raw = dir.path().join("raw");
    std::fs::write(&raw, b"QF").expect("written");
    for path in [raw.as_path(), dir.path(), &dir.path().join("none")] {
        spec.check_format(path).expect("nothing to be said");
    }
}

#[test]
fn nobody_waits_for_a_terminal_to_say_what_it_begins_with() {
    // Reading from one waits until somebody writes at the other end.
    let spec = blk("blk,path=/dev/ptmx");
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || tell.send(spec.check_format("/dev/ptmx".as_ref()).is_ok()));
    assert_eq!(
        told.recv_timeout(std::time::Duration::from_secs(60)),
        Ok(true)
    );
}

#[test]
fn what_qemu_calls_otherwise_is_answered_with_its_name_here() {
    for (given, meant) in [
        ("nbd:localhost:10809", "nbd://localhost/ here"),
        (
            "nbd:10.0.0.1:7:exportname=a b",
            "nbd://10.0.0.1:7/a%20b here",
        ),
        ("nbd:[::1]:7", "nbd://[::1]:7/ here"),
        (
            "nbd:unix:/run/s:exportname=e",
            "nbd+unix:///e?socket=/run/s here",
        ),
    ] {
        let spec = BlkSpec {
            path: Some(given.to_owned()),
            ..BlkSpec::default()
        };
        let error = spec.check().expect_err("refused").0;
        assert!(error.contains(meant) && error.contains("./nbd:"), "{error}");
    }
    // Files, though with strange names.
    for name in [
        "./nbd:localhost:10809",
        "nbd:x",
        "nbd:a:b",
        "nbd::1",
        "nbd:unix:",
    ] {
        blk(&format!("blk,path={name}")).check().expect("a file");
    }
    let refused = |text: &str| {
        keyval::from_str::<DeviceSpec>(text)
            .expect_err("refused")
            .to_string()
    };
    for text in [
        "blk,path=x,readonly",
        "blk,path=x,readonly=on",
        "blk,path=x,read-only=off",
    ] {
        let error = refused(text);
        assert!(error.ends_with("did you mean `ro`?"), "{error}");
    }
    let error = refused("blk,file=x");
    assert!(error.ends_with("did you mean `path`?"), "{error}");
    for (text, meant) in [
        ("blk,root.img", "did you mean `path=root.img`?"),
        ("blk,/srv/a,,b", "did you mean `path=/srv/a,,b`?"),
        (
            "vhost-user,/run/fs.sock,type=fs",
            "did you mean `socket=/run/fs.sock`?",
        ),
    ] {
        let error = refused(text);
        assert!(error.ends_with(meant), "{error}");
    }
}
