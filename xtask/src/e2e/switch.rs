// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests on the ports of a switch: large segments and checksums that are left to others, and VLANs.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};

use super::Stage;
use crate::lan::{self, Host};
use crate::pcap;
use crate::qemu::{self, Hardware};
use crate::report::Report;
use crate::scene::Scene;
use crate::shell::Shell;

/// The guests' file system, relative to the run's folder.
const INITRD: &str = "guest.initrd";
/// The control socket of the device host, likewise.
const CONTROL: &str = "ctl.sock";
/// Bytes of the longest frame that is no large segment.
const ORDINARY: u64 = 1514;

/// A guest on a port.
struct Member<'a> {
    /// Of the guest, its device and its port.
    name: &'a str,
    /// Its port's keys beyond name and switch.
    port: &'a str,
    /// Properties of its network device in QEMU, each behind a comma.
    properties: &'a str,
}

/// A switch with a guest on each port, all running; each has a bus of its own. The addresses are 192.168.1.1 and so on.
fn guests(stage: &mut Stage, members: &[Member<'_>]) -> Result<Vec<Host>> {
    let vmsg = stage.vmsg()?;
    let kit = stage.kit.with_tools()?;
    let file = stage.scene.dir().join(INITRD);
    std::fs::write(&file, lan::initrd(&kit, true)?).context("cannot write the guests' initrd")?;
    let mut options = vec![
        ("--control", CONTROL.to_owned()),
        ("--switch", "id=s0,allow=* <> *".to_owned()),
    ];
    for Member { name, port, .. } in members {
        options.push(("--bus", format!("unix,path={name}.bus")));
        options.push(("--device", format!("net,id={name},bus={name},switch=s0")));
        let capture = format!("capture={name}.pcap");
        options.push(("--port", format!("id={name},switch=s0,{capture}{port}")));
    }
    let options: Vec<(&str, &str)> = options.iter().map(|(n, v)| (*n, v.as_str())).collect();
    vmsg.run(&mut stage.scene, "serve", "serve", &options, members.len())?;
    let mut hosts = Vec::new();
    for (number, member) in (1..).zip(members) {
        hosts.push(guest(
            stage,
            &kit,
            member,
            Ipv4Addr::new(192, 168, 1, number),
        )?);
    }
    for host in &mut hosts {
        host.shell.booted(&mut stage.scene)?;
    }
    Ok(hosts)
}

/// Starts the proxy and the QEMU of a member.
fn guest(
    stage: &mut Stage,
    kit: &crate::kit::Kit,
    member: &Member<'_>,
    address: Ipv4Addr,
) -> Result<Host> {
    let vmsg = stage.vmsg()?;
    let Member {
        name, properties, ..
    } = member;
    let bus = format!("unix,path={name}.bus");
    let front = format!("vhost-user,socket={name}.sock,dev={name}");
    let options = [("--bus", bus.as_str()), ("--front", front.as_str())];
    vmsg.run(
        &mut stage.scene,
        &format!("proxy-{name}"),
        "proxy",
        &options,
        1,
    )?;
    let mut arguments = vmsg.printed_arguments(
        stage.scene.dir(),
        kit.machine,
        &[options[0], options[1], ("--memory", "256M")],
    )?;
    let device = arguments
        .iter_mut()
        .find(|a| a.starts_with("virtio-net-"))
        .context("no network device is printed")?;
    device.push_str(properties);
    let words = format!("NAME={name} ADDRESS={address}/24");
    let version = qemu::version(&kit.qemu)?;
    let command = qemu::command(kit, version, Hardware::Alone(&arguments, &words), INITRD)?;
    let id = stage.scene.start(name, &command)?;
    Ok(Host {
        shell: Shell::new(id, name),
        address,
    })
}

/// Ends all guests.
fn end(stage: &mut Stage, hosts: Vec<Host>) -> Result<()> {
    for host in hosts {
        host.shell.power_off(&mut stage.scene)?;
    }
    Ok(())
}

/// Frames that the guest has received.
fn received(scene: &mut Scene, host: &mut Host) -> Result<u64> {
    let command = "cat /sys/class/net/eth0/statistics/rx_packets";
    Ok(host.shell.run(scene, command)?.concat().trim().parse()?)
}

/// Large segments pass whole between guests that take them, and cut to one that does not, or has never learned it.
pub(super) fn offloads(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let plain = |name| Member {
        name,
        port: "",
        properties: "",
    };
    let members = [
        plain("large1"),
        plain("large2"),
        Member {
            properties: ",csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,\
                         host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off,mrg_rxbuf=off",
            ..plain("small")
        },
    ];
    let machine = stage.kit.machine.name();
    let mut hosts = guests(stage, &members)?;
    lan::reach(&mut stage.scene, &mut hosts, |_, _| true)?;
    for (from, to, large) in [(0, 1, true), (0, 2, false), (2, 0, false)] {
        let [a, b] = hosts.get_disjoint_mut([from, to])?;
        let scene = &mut stage.scene;
        let before = received(scene, b)?;
        let (bytes, seconds) = lan::transfer(scene, a, b)?;
        let frames = received(scene, b)? - before;
        let name = format!("{machine}/{}-to-{}", a.shell.name(), b.shell.name());
        println!("      {name}: {bytes} bytes in {seconds:.2} s, {frames} frames");
        let ordinary = bytes as u64 / ORDINARY;
        let holds = if large {
            frames < ordinary / 4
        } else {
            frames >= ordinary
        };
        report.check(&name, holds, || {
            format!("{bytes} bytes have come in {frames} frames")
        });
    }
    end(stage, hosts)
}

/// Guests on access ports of different VLANs do not hear each other; one on a trunk hears whom it wants to.
pub(super) fn vlan(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let member = |name, port| Member {
        name,
        port,
        properties: "",
    };
    let members = [
        member("ten", ",vlan=10"),
        member("twenty", ",vlan=20"),
        member("trunk", ",trunk=10:20"),
    ];
    let machine = stage.kit.machine.name();
    let mut hosts = guests(stage, &members)?;
    let scene = &mut stage.scene;
    let address = hosts[2].address;
    let untagged = lan::reach(scene, &mut hosts, |_, _| false);
    report.result(&format!("{machine}/vlan-alone"), untagged);
    for (at, vlan) in [10, 20].into_iter().enumerate() {
        let shell = &mut hosts[2].shell;
        shell.run(scene, "ip addr flush dev eth0")?;
        shell.run(
            scene,
            &format!(
                "ip link add link eth0 name tagged type vlan id {vlan} && ip addr add {address}/24 dev tagged && \
                 ip link set tagged up"
            ),
        )?;
        let reached = lan::reach(scene, &mut hosts, |from, to| {
            from == 2 && to == at || from == at && to == 2
        });
        report.result(&format!("{machine}/vlan-{vlan}"), reached);
        hosts[2].shell.run(scene, "ip link del tagged")?;
    }
    let macs = [hosts[0].mac(scene)?, hosts[1].mac(scene)?];
    for (name, other, vlan) in [("ten", macs[1], None), ("twenty", macs[0], None)] {
        let frames = pcap::read(&scene.dir().join(format!("{name}.pcap")))?;
        ensure!(!frames.is_empty(), "the capture of {name} is empty");
        let wrong = frames.iter().find(|f| f.source == other || f.vlan != vlan);
        report.check(
            &format!("{machine}/vlan-capture-{name}"),
            wrong.is_none(),
            || format!("{wrong:?} came to {name}"),
        );
    }
    let frames = pcap::read(&scene.dir().join("trunk.pcap"))?;
    let tags = [10, 20].map(|vlan| frames.iter().any(|f| f.vlan == Some(vlan)));
    report.check(
        &format!("{machine}/vlan-capture-trunk"),
        tags == [true; 2],
        || format!("frames with the tags 10 and 20: {tags:?}"),
    );
    end(stage, hosts)
}
