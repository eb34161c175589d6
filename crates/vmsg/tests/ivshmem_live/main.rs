// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Processes over the bus `ivshmem`, through a server (`socket=`) and through the one that a device host holds (`listen=`): who looks
//! at the bus, a VMM behind a proxy with traffic of two devices, and what goes on when one of them is killed.

mod looks;
mod program;
mod traffic;
#[path = "../../../vmsg-proxy/tests/vhost/mod.rs"]
mod vhost_guest;

use program::Program;
use std::path::Path;

/// Bytes of the memory: messages, and behind them what `memory=bounce` copies into.
const SIZE: &str = "16M";

/// The two ends of a bus, and the server where they do not bring one.
struct Ends {
    host: String,
    driver: String,
    server: Option<Program>,
}

impl Ends {
    /// A server, and both are its clients.
    fn socket(dir: &Path, keys: &str) -> Self {
        let path = format!("{}/iv", dir.display());
        let server = Program::start(&["ivshmem", "server", "--socket", &path, "--size", SIZE], 1);
        let bus = format!("ivshmem,socket={path}{keys}");
        Self {
            host: bus.clone(),
            driver: bus,
            server: Some(server),
        }
    }

    /// The host brings the server.
    fn listen(dir: &Path, keys: &str) -> Self {
        let path = format!("{}/held", dir.display());
        Self {
            host: format!("ivshmem,listen={path},size={SIZE}{keys}"),
            driver: format!("ivshmem,socket={path}{keys}"),
            server: None,
        }
    }

    fn serve(&self) -> Program {
        self.serve_with("")
    }

    /// A device host with `rng0` and `net0`.
    fn serve_with(&self, keys: &str) -> Program {
        let bus = format!("{}{keys}", self.host);
        let devices = ["--device", "rng", "--device", "net,backend=none"];
        let words = ["serve", "--bus", &bus, "--keep", "0"];
        Program::start(&[&words[..], &devices].concat(), 1)
    }

    /// A proxy with a front for each, at `rng` and `net`.
    fn proxy(&self, dir: &Path) -> Program {
        let at = dir.display();
        let rng = format!("vhost-user,socket={at}/rng,dev=rng0");
        let net = format!("vhost-user,socket={at}/net,dev=net0");
        let words = ["proxy", "--bus", &self.driver];
        Program::start(
            &[&words[..], &["--front", &rng, "--front", &net]].concat(),
            2,
        )
    }
}
