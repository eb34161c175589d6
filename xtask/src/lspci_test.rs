// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::{Expected, bytes, problems};

const EXPECTED: Expected = Expected {
    class: "0200",
    ids: "1af4:1041",
    queues: 2,
    config: true,
    msix: true,
};

const GOOD: &str = "\
0000:00:03.0 0200: 1af4:1041 (rev 01)
	Subsystem: 1af4:1100
	Control: I/O- Mem+ BusMaster+ SpecCycle- MemWINV- VGASnoop- ParErr- Stepping- SERR+ FastB2B- DisINTx+
	Interrupt: pin A routed to IRQ 23
	Region 1: Memory at febd5000 (32-bit, non-prefetchable) [size=4K]
	Region 4: Memory at fe010000 (64-bit, prefetchable) [size=16K]
	Capabilities: [98] MSI-X: Enable+ Count=4 Masked-
		Vector table: BAR=1 offset=00000000
		PBA: BAR=1 offset=00000800
	Capabilities: [84] Vendor Specific Information: VirtIO: <unknown>
		BAR=0 offset=00000000 size=00000000
	Capabilities: [70] Vendor Specific Information: VirtIO: Notify
		BAR=4 offset=00003000 size=00001000 multiplier=00000004
	Capabilities: [60] Vendor Specific Information: VirtIO: DeviceCfg
		BAR=4 offset=00002000 size=00001000
	Capabilities: [50] Vendor Specific Information: VirtIO: ISR
		BAR=4 offset=00001000 size=00001000
	Capabilities: [40] Vendor Specific Information: VirtIO: CommonCfg
		BAR=4 offset=00000000 size=00001000
	Kernel driver in use: virtio-pci
";

#[test]
fn a_correct_function_has_no_problems() {
    assert_eq!(problems(GOOD, &EXPECTED), Vec::<String>::new());
}

#[test]
fn each_fault_is_named() {
    for (what, by, named) in [
        (
            "0200: 1af4:1041",
            "0200: 1af4:1000",
            "is not 0200: 1af4:1041",
        ),
        (" (rev 01)", " (rev 00)", "revision"),
        ("Interrupt:", "Other:", "no interrupt pin"),
        ("Enable+", "Enable-", "not as wanted"),
        ("Count=4", "Count=2", "vector for each"),
        ("Masked-", "Masked+", "masked"),
        ("offset=00003000", "offset=00003800", "Notify lies outside"),
        ("VirtIO: ISR", "VirtIO: Notify", "0 virtio capabilities ISR"),
        ("VirtIO: DeviceCfg", "<chain broken>", "broken"),
        ("Region 1: Memory", "Region 0: Memory", "other regions"),
        ("PBA: BAR=1", "PBA: BAR=2", "lies outside"),
        (
            "driver in use: virtio-pci",
            "driver in use: other",
            "driver 'other'",
        ),
    ] {
        let found = problems(&GOOD.replace(what, by), &EXPECTED);
        let hit = found.iter().any(|p| p.contains(named));
        assert!(hit, "{what} by {by}: {found:?}");
    }
}

#[test]
fn a_device_without_a_configuration_may_leave_its_capability_out() {
    let without = GOOD.replace(
        "\tCapabilities: [60] Vendor Specific Information: VirtIO: DeviceCfg\n\t\tBAR=4 offset=00002000 size=00001000\n",
        "",
    );
    assert_ne!(without, GOOD);
    let entropy = Expected {
        config: false,
        ..EXPECTED
    };
    assert_eq!(problems(&without, &entropy), Vec::<String>::new());
    assert_eq!(problems(GOOD, &entropy), Vec::<String>::new());
    assert!(!problems(&without, &EXPECTED).is_empty());
}

#[test]
fn sizes_of_regions_are_read() {
    assert_eq!(bytes("4K"), Some(4096));
    assert_eq!(bytes("1M"), Some(1 << 20));
    assert_eq!(bytes("256"), Some(256));
    assert_eq!(bytes("x"), None);
}
