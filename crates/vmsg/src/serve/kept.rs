// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The keeper, which holds connections of `backend=user` for the next `serve`: looked for, or started, when the first device or
//! uplink comes that has something to keep.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::keeper::{Keeper, Kept};
use crate::spec::{DeviceSpec, NetBackend, UplinkSpec};

/// The keeper, once there is one, and what it holds for devices that have not come yet.
#[derive(Default)]
pub(super) struct Keeping {
    /// Where it is, and for how many seconds it is to wait; none: there is to be none.
    place: Option<(PathBuf, u64)>,
    kept: Option<KeptFlows>,
}

struct KeptFlows {
    keeper: Keeper,
    flows: HashMap<String, Vec<Kept>>,
}

/// What is kept for one device, and where more goes.
pub(super) struct DeviceFlows {
    pub(super) keeper: Keeper,
    pub(super) flows: Vec<Kept>,
}

/// Whether a device has something to keep.
pub(super) fn is_kept(spec: &DeviceSpec) -> bool {
    matches!(spec, DeviceSpec::Net(net)
        if net.switch.is_none() && net.backend.unwrap_or_default() == NetBackend::User)
}

/// Whether an uplink has.
pub(super) fn is_uplink_kept(spec: &UplinkSpec) -> bool {
    spec.backend == Some(NetBackend::User)
}

impl Keeping {
    /// Nothing is looked for yet. `place`: the keeper's socket, and seconds; 0 for none.
    pub(super) fn new(place: PathBuf, seconds: u64) -> Self {
        Self {
            place: (seconds > 0).then_some((place, seconds)),
            kept: None,
        }
    }

    /// Finds or starts the keeper.
    pub(super) fn start(&mut self) {
        let (Some((path, seconds)), None) = (&self.place, &self.kept) else {
            return;
        };
        match Keeper::find_or_start(path, *seconds) {
            Ok((keeper, flows)) => self.kept = Some(KeptFlows { keeper, flows }),
            Err(error) => tracing::warn!(
                error = format!("{error:#}"),
                "connections will not survive this process"
            ),
        }
    }

    /// What is kept for the device or uplink called `id`, which takes it over.
    pub(super) fn take(&mut self, id: &str) -> Option<DeviceFlows> {
        let kept = self.kept.as_mut()?;
        Some(DeviceFlows {
            keeper: kept.keeper.clone(),
            flows: kept.flows.remove(id).unwrap_or_default(),
        })
    }

    /// The same for one that comes while others run; `is_kept`: it has something to keep.
    pub(super) fn take_late(&mut self, id: &str, is_kept: bool) -> Option<DeviceFlows> {
        let is_first = is_kept && self.kept.is_none();
        if is_first {
            self.start();
        }
        let taken = self.take(id);
        if is_first {
            self.forget_rest();
        }
        taken
    }

    /// Whether nothing is held for anybody.
    pub(super) fn is_idle(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.flows.is_empty())
    }

    /// Lets go of the connections of devices that are no more.
    pub(super) fn forget_rest(&mut self) {
        let Some(kept) = &mut self.kept else { return };
        for (device, flows) in kept.flows.drain() {
            let connections = flows.len();
            tracing::warn!(device, connections, "closed, as the device is gone");
            for flow in flows {
                kept.keeper.remove(&device, flow.key);
            }
        }
    }

    /// Sends the keeper home.
    pub(super) fn dismiss(&mut self) {
        if let Some(kept) = self.kept.take() {
            kept.keeper.dismiss();
        }
    }
}
