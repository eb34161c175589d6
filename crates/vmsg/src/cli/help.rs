// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What specifications may say, for `vmsg serve --help`.

/// What `vmsg serve --help` ends with.
pub(super) const DEVICES: &str = "\
A bus, any:
  id=NAME                      what devices call it; the name of its socket without the ending by default

A bus, unix:
  path=SOCKET                  where drivers connect
  mode=OCTAL                   permissions of the socket; 0600 by default
  message-size=BYTES, slots=N  the largest message, and the slots for messages in each queue
  max-connections=N            how many drivers there may be at a time
  trace=FILE                   record all messages, for `vmsg trace` and Wireshark

A bus, linux-user (as QEMU's virtio-msg-bus-linux-user; one driver at a time):
  name=NAME, dir=DIR           the queues are DIR/queue-NAME-driver and -device; linux-user and . by default
  socket=SOCKET                the doorbell, in DIR; linux-user.socket by default
  server=on|off                listen on the socket, or connect to it; serve listens by default
  ram=FILE                     the guest's memory, as in QEMU's memory-backend-file with share=on
  mem-offset=ADDR              where it begins for the guest; 0x40000000 by default
  mem-low-size=SIZE, mem-hole=SIZE
                               how much of it lies below a hole, and how large that is; no hole by default
  revision=1|r1                the messages; r1 are those of February 2025
  trace=FILE                   record all messages

A bus, ivshmem (memory that two machines have in common; one driver at a time):
  socket=SOCKET                that of an ivshmem server (`vmsg ivshmem server`, QEMU's); or
  listen=SOCKET                start one here, with size=SIZE (1M; 32M with ram=bar), vectors=N (1) and
                               shm=NAME or file=FILE; drivers have socket=SOCKET; or
  pci=ADDRESS|auto             in a guest: ivshmem's PCI function; or
  shm=NAME, file=FILE          memory alone, without doorbells; size=SIZE makes it
  memory=bounce|segment|whole|known
                               how a device reaches the guest's memory, the same on both sides: copies, the
                               only way that isolates; a part in which the guest lives; all of the driver's
                               machine; the guest's file, as foreign drivers have it
  ram=bar|pci:ADDRESS|FILE     where that memory is on this side: behind the messages, in a PCI function, a file
  ram-offset=BYTES, ram-size=SIZE
                               which part of that; all by default, with bar from the first whole MiB behind
                               the messages
  node=N | window=BASE+SIZE    proxy, segment and whole: which physical memory that is here, in place of ram=
  layout=amp|spsc|amp-pci      how the messages lie in the memory; amp by default
  offset=BYTES                 where they begin; 4096 by default with amp, else 0
  peer=ID, vector=N            whom to ring, if it does not show itself; this bus's vector, 0 by default
  message-size=BYTES           the largest message, with amp; 64 by default
  mem-offset=, mem-low-size=, mem-hole=
                               with memory=known, as for linux-user
  trace=FILE                   record all messages

All devices:
  id=NAME        what `vmsg ctl` and messages call it; net0, net1, …, rng0, …, blk0, … by default
  num=N          its number on the bus, 0 to 65535, by which drivers find it, as in dev=N of a proxy;
                 by default the lowest that no device of the bus has, or has had
  bus=NAME       the bus that it is on; the first one by default
  worker=N       which thread serves it, counted from 0

blk (a disk):
  path=FILE                    an image, or a block device of the host; or
  path=nbd://HOST[:PORT]/EXPORT, path=nbd+unix:///EXPORT?socket=PATH
                               what an NBD server has
  format=raw|qcow2             what is in the file; never guessed: raw by default, and a file that begins as
                               qcow2 images do is refused without this key
  ro=on|off                    nothing is written; off by default
  serial=TEXT                  up to 20 bytes; the id by default
  cache=writeback|writethrough|none
                               what is written is in the host's page cache until the guest flushes (default),
                               on the medium before the guest hears of it, or goes past the page cache
  queues=N                     1 to 256; 1 by default
  block-size=BYTES             raw files: 512 to 1M; what the medium has, or 512, by default
  discard=on|off               whether space that the guest does not need any more is given back; on by default
  backing=on|off               qcow2: whether the image may name other files to read; off by default
  engine=auto|uring|inline|threads
                               raw files: who reads and writes; by default the worker itself for files in
                               memory, else the kernel by io_uring, or threads where that is not to be had

console:
  path=SOCKET                  where `vmsg console`, socat and the like attach; the control socket's path with
                               .ID.console behind it by default; further ports: .PORT behind it
  pty=LINK                     a symbolic link to a pseudoterminal
  log=FILE                     append what the guest writes
  port=NAME                    a further port, in the guest /dev/virtio-ports/NAME; may be repeated
  multiport=on|off             offer several ports; on by default if there are any but the console
  size-order=cols-first|rows-first
                               with several ports: how the guest's kernel reads sizes; cols-first, as in the
                               standard, by default; Linux before 6.15 (stable kernels: before 2026)
                               wants rows-first

vhost-user (the device of a vhost-user daemon; docs/bridge.md):
  socket=PATH                  where the daemon listens
  server=on|off                we listen there and the daemon connects; off by default
  type=NAME|NUMBER             what it is: blk, fs, net, vsock, scsi, i2c, gpio, sound, gpu, …, or the
                               number that the specification gives the type
  queues=N, queue-size=N       virtqueues in all, and entries of each at most; what the daemon says, or
                               what daemons of the type take, by default
  config-size=N, config=HEX    the configuration space, where the daemon does not tell it
  tag=TAG, cid=N, mac=ADDRESS  of fs, vsock and net, where the daemon does not tell it
  resume=in-order|record|never what becomes of requests under way when the daemon ends; by type
  reconnect=SECONDS            between two attempts to reach the daemon at most; 1 by default

net:
  backend=user|tap|socket|vhost-user|none
                               a private network with DHCP, DNS and a way out (default), an interface
                               of the host, a socket to another VM or to passt, a port of Open vSwitch,
                               or nothing
  mac=XX:XX:XX:XX:XX:XX        derived from the id by default
  mtu=BYTES                    576 to 65520; 1500 by default, or that of the tap interface
  queues=N                     pairs of queues, 1 to 256; 1 by default
  link=up|down                 whether the cable is in at first; `vmsg ctl` changes it; up by default
  speed=MBITS, duplex=full|half
                               what the guest is told about the line; nothing by default
  rss=on|off                   offer the guest to choose queues by its own table; on by default
  hash=on|off                  offer the guest to report the hash of each frame; on by default
  pcap=FILE                    record all frames, for Wireshark

net, backend=user:
  hostfwd=tcp|udp:[ADDR]:PORT-[GUEST]:PORT
                               lead a port of the host into the guest; may be repeated;
                               ADDR is 127.0.0.1 by default
  net=ADDR/LENGTH              the guest's network; 10.0.2.0/24 by default
  host=ADDR, dns=ADDR          gateway and name server as the guest sees them: .2 and .3 in it
  dhcpstart=ADDR               the guest's address: .15 in it
  ipv6=on|off                  whether there is IPv6, too; on by default
  ipv6-net=PREFIX/64           the network in IPv6; fd00:10:0:2::/64 by default
  ipv6-host=ADDR, ipv6-dns=ADDR
                               gateway and name server: ::2 and ::3 in it
  tcp-flows=N, udp-flows=N     connections and conversations at a time; 4096 and 1024 by default
  hostname=NAME                which DHCP tells the guest
  resolver=ADDR[:PORT]         name server to ask; those of /etc/resolv.conf by default;
                               may be repeated
  host-loopback=on|off         whether the gateway's address leads to services on the host's own
                               127.0.0.1; on by default
  restrict=on|off              the guest reaches nothing but who came in by hostfwd; off by default

net, backend=tap:
  ifname=NAME                  joined, or created, for which this process needs CAP_NET_ADMIN, if it
                               is not there (`ip tuntap add`); tap%d, the next free number, by default
  fd=N, fds=N:N:…              instead: descriptors of an interface that were opened for vmsg
  addr=ADDR/LENGTH             an address for the host's side; may be repeated
  up=on|off                    set the interface up; by default if it is created here
  offloads=on|off              large frames, checksums left to the other side; on by default
  queues=N                     more than one needs an interface with multi_queue

net, backend=socket (QEMU's -netdev stream, dgram and socket; passt):
  mode=stream|dgram            stream by default
  path=SOCKET                  stream: connect to a Unix socket, as of passt
  host=NAME, port=N            stream: connect by TCP
  server=on                    stream: listen there instead
  reconnect=SECONDS            stream: longest pause between attempts, 1 by default; 0: no attempts
  local=…, remote=…            dgram: both ends: paths with a `/` in them, or ADDR:PORT
  mcast=GROUP:PORT             dgram: a multicast group instead
  localaddr=ADDR               dgram: with mcast, the address of the interface to use

net, backend=vhost-user (a port of Open vSwitch, DPDK, or another vhost-user back end):
  path=SOCKET                  where the two meet
  server=on                    listen there: for dpdkvhostuserclient; by default it connects
  reconnect=SECONDS            longest pause between attempts, 1 by default
  offloads=on|off              large frames, checksums left to the other side; on by default

net, switch=NAME, instead of backend=: the device plugs into a switch of this process, at a port of its name

A switch:
  id=NAME                      s0, s1, … by default
  allow=RULE, deny=RULE        who may send to whom, by the names of ports: 'net0 > net1', 'net0 <> net1' for
                               both directions, 'web* > *' for any; each may be repeated; a deny counts
                               whatever is allowed; without any allow nobody reaches anybody
  rule=+RULE|-RULE             behind all of these, in this order, the last one counts: + allows, - denies
  unknown=flood|drop|UPLINK    where frames to unknown addresses go; flood by default
  age=SECONDS, table=N         when an address is forgotten, and how many are known: 300 and 8192 by default
  worker=N                     which thread serves all its ports

A port (of the device, or uplink, that has its name):
  id=NAME, switch=NAME
  vlan=N                       it is in this VLAN, without tags; by default it knows of no VLANs
  trunk=all|N:N-N:…, native=N  it carries these VLANs with tags, and one without
  pin=on|MAC                   its source addresses: that of the device, or these; may be repeated
  mac=MAC                      always found here; may be repeated
  macs=N                       addresses learned here at most; 256 by default
  rate-in=RATE, rate-out=RATE  bits a second that it may send and be sent, as in 100M; what is too much
                               waits, or is dropped
  storm=N                      frames a second to many receivers that it may send
  capture=FILE                 record its frames, for Wireshark
  capture-append=on            go on with the file that is there; one that cannot be gone on with is left alone
  link=up|down

An uplink:
  id=NAME, switch=NAME, backend=tap|socket|vhost-user|user, mtu=BYTES and the keys of that back end

Examples:
  vmsg serve --bus unix,path=b0.sock --device net,id=net0,hostfwd=tcp::2222-:22 --device rng
  vmsg serve --bus unix,path=b0.sock --bus unix,path=b1.sock --switch 'id=s0,allow=* <> *' \\
    --device net,id=net0,bus=b0,switch=s0 --device net,id=net1,bus=b1,switch=s0 --control ctl.sock";
