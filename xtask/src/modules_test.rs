// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::fs;
use std::path::Path;

use super::resolve;

fn write(dir: &Path, path: &str, depends: &str) {
    let file = dir.join("kernel").join(path);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let object = format!("\x7fELF\0license=GPL\0depends={depends}\0name=x\0").into_bytes();
    if path.ends_with(".xz") {
        let mut packed = Vec::new();
        lzma_rs::xz_compress(&mut object.as_slice(), &mut packed).unwrap();
        fs::write(file, packed).unwrap();
    } else {
        fs::write(file, object).unwrap();
    }
}

#[test]
fn a_module_comes_after_those_it_depends_on_and_once() {
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        "net/virtio_net.ko",
        "virtio_ring,virtio,net-failover",
    );
    write(dir.path(), "net/net_failover.ko.xz", "failover");
    write(dir.path(), "net/failover.ko", "");
    write(dir.path(), "virtio/virtio_ring.ko", "virtio");
    write(dir.path(), "char/virtio-rng.ko", "virtio,rng-core");
    write(dir.path(), "virtio/virtio.ko.xz", "");
    fs::write(
        dir.path().join("modules.builtin"),
        "kernel/drivers/char/rng-core.ko\n",
    )
    .unwrap();
    let names: Vec<String> = resolve(dir.path(), &["virtio_net", "virtio_rng"])
        .unwrap()
        .into_iter()
        .map(|m| m.name)
        .collect();
    assert_eq!(
        names,
        [
            "virtio",
            "virtio_ring",
            "failover",
            "net_failover",
            "virtio_net",
            "virtio_rng"
        ]
    );
}

#[test]
fn a_missing_module_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "net/virtio_net.ko", "virtio");
    let error = resolve(dir.path(), &["virtio_net"])
        .unwrap_err()
        .to_string();
    assert!(error.contains("has no virtio:"), "{error}");
}
