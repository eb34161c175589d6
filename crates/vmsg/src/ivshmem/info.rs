// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem info`, `bind` and `unbind`.

use std::io::{self, Write};

use clap::Args;
use ivshmem::Device;
use ivshmem::pci::{Access, Function, Kind, Tree};

use super::place::{Place, Which, size};
use crate::out::Out;

/// `vmsg ivshmem info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    #[command(flatten)]
    place: Place,
}

/// `vmsg ivshmem bind` and `unbind`.
#[derive(Debug, Args)]
pub struct BindArgs {
    /// The address of the PCI function, or auto: the only one, or the only one with doorbells
    #[arg(value_name = "ADDRESS")]
    which: Which,
}

/// Says what there is.
pub(super) fn info(args: &InfoArgs) -> anyhow::Result<()> {
    if args.place.is_named() {
        let device = args.place.open()?;
        return Ok(tell(&mut Out::lock(), &device)?);
    }
    let functions = Tree::default().functions()?;
    let mut out = Out::lock();
    if functions.is_empty() {
        return Err(ivshmem::pci::Error::None.into());
    }
    // A function whose memory is to be touched may be taken away.
    vmsg_mem::fault::install()?;
    for function in functions {
        list(&mut out, &function)?;
    }
    Ok(())
}

/// Gives a function to vfio-pci.
pub(super) fn bind(args: &BindArgs) -> anyhow::Result<()> {
    let function = args.which.function()?.bind()?;
    Ok(list_driver(&mut Out::lock(), &function)?)
}

/// Takes a function from its driver.
pub(super) fn unbind(args: &BindArgs) -> anyhow::Result<()> {
    let function = args.which.function()?.unbind()?;
    Ok(list_driver(&mut Out::lock(), &function)?)
}

fn list_driver(out: &mut impl Write, function: &Function) -> io::Result<()> {
    let driver = function.driver().unwrap_or("none");
    writeln!(out, "{} driver={driver}", function.address())
}

/// One line about a function.
fn list(out: &mut impl Write, function: &Function) -> io::Result<()> {
    let kind = match function.kind() {
        Kind::Plain => "ivshmem-plain",
        Kind::Doorbell => "ivshmem-doorbell",
    };
    let number = |number: Option<u32>| number.map_or("-".into(), |number| number.to_string());
    write!(
        out,
        "{} {kind} revision={} memory={} driver={} group={}",
        function.address(),
        function.revision(),
        size(function.memory_size()).replace(' ', ""),
        function.driver().unwrap_or("-"),
        number(function.group()),
    )?;
    if function.kind() == Kind::Doorbell {
        write!(
            out,
            " vectors={}",
            number(function.vectors().map(u32::from))
        )?;
        match Device::pci(function, Access::Auto) {
            Ok(device) => {
                let id = device.id().map(|id| u32::from(id.0));
                write!(out, " id={}", number(id))?;
            }
            Err(error) => write!(out, " id=? ({error})")?,
        }
    }
    writeln!(out)
}

/// What an end has.
fn tell(out: &mut impl Write, device: &Device) -> io::Result<()> {
    let memory = device.memory();
    let kind = if memory.ram().is_some() {
        "ordinary memory"
    } else {
        "device memory, for aligned accesses only"
    };
    writeln!(out, "memory  {} ({kind})", size(memory.len() as u64))?;
    match device.id() {
        Some(id) => writeln!(out, "id      {id}")?,
        None => writeln!(out, "id      none: there are no doorbells")?,
    }
    match device.vectors() {
        0 if device.id().is_some() => writeln!(
            out,
            "vectors 0: others can be rung, but no doorbell is heard (`vmsg ivshmem bind`)"
        )?,
        vectors => writeln!(out, "vectors {vectors}")?,
    }
    if let Some(client) = device.as_client() {
        let peers: Vec<String> = client
            .peers()
            .map(|(peer, vectors)| format!("{peer} ({vectors} vectors)"))
            .collect();
        let peers = if peers.is_empty() {
            "none".into()
        } else {
            peers.join(", ")
        };
        writeln!(out, "peers   {peers}")?;
    }
    Ok(())
}
