// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The consoles of this process, whoever made them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmsg_device::console::Handle;

/// All consoles that there are now, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registry(Arc<Mutex<Vec<Handle>>>);

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Vec<Handle>> {
        let mut consoles = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        consoles.retain(|console| !console.is_ended());
        consoles
    }

    /// There is another one. It is forgotten when its hub ends.
    pub(crate) fn add(&self, console: Handle) {
        self.lock().push(console);
    }

    /// Those that there are.
    pub(crate) fn list(&self) -> Vec<Handle> {
        self.lock().clone()
    }

    /// The one of this name.
    pub(crate) fn find(&self, name: &str) -> Option<Handle> {
        self.lock()
            .iter()
            .find(|console| console.name() == name)
            .cloned()
    }
}

#[cfg(test)]
mod tests {
    use vmsg_device::console::{Hub, HubConfig};

    use super::*;

    #[test]
    fn a_console_is_there_while_its_hub_is() {
        let registry = Registry::default();
        let hub = |name: &str| {
            Hub::open(&HubConfig {
                name: name.to_owned(),
                ..HubConfig::default()
            })
            .expect("a hub")
        };
        let (a, b) = (hub("a"), hub("b"));
        registry.add(a.handle());
        registry.add(b.handle());
        assert_eq!(registry.list().len(), 2);
        drop(a);
        assert!(registry.find("a").is_none());
        assert_eq!(registry.find("b").expect("there").name(), "b");
    }
}
