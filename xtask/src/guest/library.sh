# SPDX-License-Identifier: Apache-2.0 OR MIT
# Functions for guest scripts. The host reads the console: `MARK name detail` tells it how far the script is,
# `CHECK name ok` and `CHECK name FAIL why` are results. Each is one write, so that the kernel cannot cut in.

mark() { echo "MARK $*"; }

ok() { echo "CHECK $1 ok"; }
bad() { name=$1; shift; echo "CHECK $name FAIL $*"; }

# check NAME COMMAND…: the check holds if the command succeeds; what it printed is the reason if not.
check() {
    name=$1; shift
    if why=$("$@" 2>&1); then ok "$name"; else bad "$name" "$* gave $?: $(echo $why)"; fi
}

# Ends the guest at once: nothing that follows could hold.
fail() {
    bad guest "$*"
    dmesg | tail -n 40
    mark done
    poweroff -f
    sleep 100
}

# await SECONDS COMMAND…: until the command succeeds. Polls, for things of which the kernel tells only udev.
await() {
    left=$(($1 * 20)); shift
    until "$@" > /dev/null 2>&1; do
        left=$((left - 1))
        [ $left -gt 0 ] || return 1
        usleep 50000
    done
}

# disk_of SERIAL: prints the name of the disk with this serial number.
disk_of() {
    for serial in /sys/block/*/serial; do
        [ "$(cat $serial 2> /dev/null)" != "$1" ] || { serial=${serial%/serial}; echo "${serial##*/}"; return 0; }
    done
    return 1
}

# nic_of MAC: prints the name of the network device with this address.
nic_of() {
    for nic in /sys/class/net/*; do
        [ "$(cat $nic/address)" != "$1" ] || { echo "${nic##*/}"; return 0; }
    done
    return 1
}

# name_nic MAC NAME: gives the device with this address this name; one that has the name already gives way.
name_nic() {
    await 10 nic_of "$1" || return 1
    nic=$(nic_of "$1")
    [ "$nic" != "$2" ] || return 0
    ip link set "$nic" down
    if [ -e "/sys/class/net/$2" ]; then
        ip link set "$2" down
        ip link set "$2" name "was$2" || return 1
    fi
    ip link set "$nic" name "$2"
}

# address_of NIC: prints its IPv4 address, without the prefix length.
address_of() { ip -4 -o addr show dev "$1" | sed -n 's/.* inet \([0-9.]*\).*/\1/p'; }

# lease NIC: brings it up and asks for an address by DHCP.
lease() {
    ip link set "$1" up && udhcpc -i "$1" -s /lease -n -q -f -t 20 -T 1 -A 1
}
