// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The two kinds of machine a guest runs on.

use clap::ValueEnum;

/// A machine type: processor, board and the virtio transport that board uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Machine {
    /// x86-64 on the `q35` board, virtio over PCI.
    X86,
    /// arm64 on the `virt` board, virtio over MMIO.
    Arm64,
}

impl Machine {
    /// Every machine type, in the order the tests run them.
    pub(crate) const ALL: [Self; 2] = [Self::X86, Self::Arm64];

    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86 => "x86",
            Self::Arm64 => "arm64",
        }
    }

    /// Debian's name of the architecture.
    pub(crate) fn debian_arch(self) -> &'static str {
        match self {
            Self::X86 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// The QEMU program that emulates it.
    pub(crate) fn qemu_program(self) -> &'static str {
        match self {
            Self::X86 => "qemu-system-x86_64",
            Self::Arm64 => "qemu-system-aarch64",
        }
    }

    /// The Debian package with that program.
    pub(crate) fn qemu_package(self) -> &'static str {
        match self {
            Self::X86 => "qemu-system-x86",
            Self::Arm64 => "qemu-system-arm",
        }
    }

    /// The kernel's name of the virtio transport module.
    pub(crate) fn transport_module(self) -> &'static str {
        match self {
            Self::X86 => "virtio_pci",
            Self::Arm64 => "virtio_mmio",
        }
    }

    /// How the demo names the transport.
    pub(crate) fn transport_name(self) -> &'static str {
        match self {
            Self::X86 => "virtio-pci",
            Self::Arm64 => "virtio-mmio",
        }
    }

    /// The guest's console device.
    pub(crate) fn console(self) -> &'static str {
        match self {
            Self::X86 => "ttyS0",
            Self::Arm64 => "ttyAMA0",
        }
    }
}
