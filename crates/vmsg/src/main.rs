// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The `vmsg` command.

fn main() -> std::process::ExitCode {
    vmsg::main()
}
