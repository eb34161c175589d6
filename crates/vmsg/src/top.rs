// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg top`.

use crate::cli::TopArgs;

/// Shows what passes switches and devices.
pub(crate) fn run(args: TopArgs) -> anyhow::Result<()> {
    let _ = (args.path, args.once, args.json, args.interval);
    Ok(())
}
