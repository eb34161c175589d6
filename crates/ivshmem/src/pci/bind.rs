// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Binding a function to vfio-pci.

use std::fs;
use std::io;
use std::path::Path;

use super::function::link;
use super::{Error, Function};

const VFIO_PCI: &str = "vfio-pci";

impl Function {
    /// Binds the function to vfio-pci, taking it from another driver if it has one. Needs root. Returns the
    /// function as it is then.
    ///
    /// # Errors
    ///
    /// [`Error`], which says what to do.
    pub fn bind(&self) -> Result<Self, Error> {
        if self.driver() == Some(VFIO_PCI) {
            return Ok(self.clone());
        }
        let sys = &self.tree().sys;
        if !sys.join("bus/pci/drivers").join(VFIO_PCI).exists() {
            return Err(Error::NoModule(VFIO_PCI));
        }
        // Without one vfio-pci refuses it in the probe, where the reason stays in the kernel's log. With
        // enable_unsafe_noiommu_mode it makes a group.
        let no_iommu = sys.join("module/vfio/parameters/enable_unsafe_noiommu_mode");
        let no_iommu = fs::read_to_string(no_iommu).is_ok_and(|text| text.trim() == "Y");
        if self.group().is_none() && !no_iommu {
            return Err(Error::NoGroup(self.address()));
        }
        self.set_override(VFIO_PCI)?;
        self.release()?;
        self.probe()?;
        let bound = self.again()?;
        if bound.driver() == Some(VFIO_PCI) {
            Ok(bound)
        } else {
            Err(Error::NotTaken(self.address()))
        }
    }

    /// Takes the function from its driver, and lets the kernel find another one. Needs root. Returns the
    /// function as it is then.
    ///
    /// # Errors
    ///
    /// [`Error`], which says what to do.
    pub fn unbind(&self) -> Result<Self, Error> {
        // An empty line takes the override away.
        self.set_override("\n")?;
        self.release()?;
        self.probe()?;
        self.again()
    }

    /// The function as it is now.
    fn again(&self) -> Result<Self, Error> {
        self.tree().function(self.address())
    }

    fn set_override(&self, driver: &str) -> Result<(), Error> {
        write(&self.dir().join("driver_override"), driver)
    }

    fn release(&self) -> Result<(), Error> {
        if self.driver().is_none() {
            return Ok(());
        }
        write(
            &self.dir().join("driver/unbind"),
            &self.address().to_string(),
        )
    }

    fn probe(&self) -> Result<(), Error> {
        write(
            &self.tree().sys.join("bus/pci/drivers_probe"),
            &self.address().to_string(),
        )
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    match fs::write(path, text) {
        // The driver has refused it, which shows in what it is bound to.
        Err(error) if path.ends_with("drivers_probe") && is_refusal(&error) => Ok(()),
        other => other.map_err(|error| Error::file(path.into(), error)),
    }
}

fn is_refusal(error: &io::Error) -> bool {
    error.kind() != io::ErrorKind::PermissionDenied && error.kind() != io::ErrorKind::NotFound
}

/// What else is in the group and has a driver that keeps VFIO from it: addresses and drivers.
pub(super) fn others(function: &Function) -> Vec<String> {
    let dir = function.dir().join("iommu_group/devices");
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut others: Vec<String> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let driver = link(&entry.path(), "driver")?;
            let address = entry.file_name().into_string().ok()?;
            (!driver.starts_with("vfio")).then(|| format!("{address} ({driver})"))
        })
        .collect();
    others.sort();
    others
}
