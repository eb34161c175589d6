// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory that both ends have in common, as a specification says it.

use super::doors::Doors;
use super::spec::{IvshmemSpec, MemoryMode, Ram};
use crate::{CommonFile, CommonMode, CommonRam, CommonRamError, Physical, StaticRam};
use std::sync::Arc;
use vmsg_mem::Mapping;

/// Opens what `spec` says of it, or nothing if that says nothing, or that both sides know where it is ([`static_ram`]).
/// `device` has the memory of the messages.
///
/// # Errors
/// [`CommonRamError`].
pub(super) fn open(
    spec: &IvshmemSpec,
    device: &Doors,
) -> Result<Option<CommonRam>, CommonRamError> {
    let mode = match spec.memory {
        None | Some(MemoryMode::Known) => return Ok(None),
        Some(MemoryMode::Whole) => CommonMode::Whole,
        Some(MemoryMode::Segment) => CommonMode::Segment,
        Some(MemoryMode::Bounce) => CommonMode::Bounce,
    };
    let offset = spec.common_offset();
    let mut common = match &spec.ram {
        Some(Ram::Bar) => CommonRam {
            file: file_of(device, offset),
            ..of_bar(mode, device.memory().ram().as_ref(), offset, spec.ram_size)?
        },
        Some(ram) => {
            vmsg_mem::fault::install().map_err(|source| CommonRamError::Open {
                path: ram.to_string(),
                source,
            })?;
            let path = ram.path().unwrap_or_default();
            CommonRam::map(mode, &path, offset, spec.ram_size)?
        }
        // The driver's side need not touch what the guest's own memory is.
        None => CommonRam {
            mode,
            len: spec.window.map_or(0, |window| window.size),
            mapping: None,
            file: None,
            physical: None,
            name: String::new(),
        },
    };
    if let Some(ram) = &spec.ram {
        common.name = ram.to_string();
    }
    common.physical = match (spec.node, spec.window) {
        (Some(node), _) => Some(Physical::Node(node)),
        (None, Some(window)) => Some(Physical::Window {
            base: window.base,
            size: window.size,
        }),
        (None, None) if mode == CommonMode::Whole => Some(Physical::Whole),
        (None, None) => None,
    };
    Ok(Some(common))
}

/// Which file a server's memory is: another one is other memory, whatever it is called.
fn file_of(device: &Doors, offset: u64) -> Option<CommonFile> {
    let stat = rustix::fs::fstat(device.as_client()?.memory_fd()).ok()?;
    // The types of the fields differ between architectures.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    let (device, inode) = (stat.st_dev as u64, stat.st_ino as u64);
    Some(CommonFile {
        device,
        inode,
        offset,
    })
}

fn of_bar(
    mode: CommonMode,
    bar: Option<&Arc<Mapping>>,
    offset: u64,
    len: Option<u64>,
) -> Result<CommonRam, CommonRamError> {
    let path = || "bar".to_owned();
    let Some(bar) = bar else {
        return Err(CommonRamError::WordsOnly { path: path() });
    };
    let have = bar.len() as u64;
    let need = offset.saturating_add(len.unwrap_or(1));
    if have < need || len == Some(0) {
        return Err(CommonRamError::TooShort {
            path: path(),
            have,
            need,
        });
    }
    let len = len.unwrap_or(have - offset);
    let part = usize::try_from(offset)
        .ok()
        .zip(usize::try_from(len).ok())
        .and_then(|(offset, len)| bar.part(offset, len));
    let part = part.ok_or(CommonRamError::TooShort {
        path: path(),
        have,
        need,
    })?;
    Ok(CommonRam::of_mapping(mode, Arc::new(part), "bar"))
}

/// The driver's memory in mode `known`, as on `linux-user`.
pub(super) fn static_ram(spec: &IvshmemSpec) -> Option<StaticRam> {
    let path = match (spec.memory, &spec.ram) {
        (Some(MemoryMode::Known), Some(ram)) => ram.path()?,
        _ => return None,
    };
    let ram = StaticRam::new(
        path,
        spec.mem_offset.unwrap_or(0),
        spec.mem_low_size.unwrap_or(0),
        spec.mem_hole.unwrap_or(0),
    );
    Some(ram.within(spec.ram_offset.unwrap_or(0), spec.ram_size))
}
