# SPDX-License-Identifier: Apache-2.0 OR MIT
# The other side of the devices goes away or stands still, and later is there again: until then the guest never waits
# for long.
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
device=$(readlink -f /sys/class/net/eth1/device)
virtio=${device##*/}
function=$(basename "${device%/*}")
net=/sys/bus/virtio/drivers/virtio_net
rng=/sys/bus/virtio/drivers/virtio_rng
rng_virtio=$(basename "$(ls -d $rng/virtio*)")
# Addresses that come by themselves are commands on the control queue, at any time (see below).
[ ! -e /proc/sys/net/ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
lease eth1 || fail "no address"
ping -q -c 2 -i 0.1 10.0.2.2 || fail "no answer"

# soon NAME COMMAND…: whatever comes of it, it comes within ten seconds, and in half of what QEMU would wait for.
soon() {
    name=$1; shift
    begun=$(cut -d ' ' -f 1 /proc/uptime)
    timeout 10 "$@" > /tmp/soon 2>&1
    result=$?
    took=$(awk -v from="$begun" '{ print int(($1 - from) * 1000) }' /proc/uptime)
    mark took "$name $took ms, result $result: $(head -c 200 /tmp/soon | tr '\n' ' ')"
    # 143: it was still at it. What a signal cannot end does not even come to this.
    [ $result != 143 ] && [ $result != 124 ] && [ "$took" -lt 5000 ] && ok "$name" || bad "$name" "took $took ms, result $result"
}

mark ready
read -r answer
soon gone-lspci lspci -nvv -s "$function"
soon gone-status cat "$device/status" "$device/features"
soon gone-send ping -q -c 3 -i 0.2 -W 1 10.0.2.2
soon gone-rng-unbind sh -c "echo $rng_virtio > $rng/unbind"
# To bind it again waits until somebody answers: the kernel's own reader of entropy may hold, while it waits for the new
# device's first bytes, the lock that the end of the probe needs.
soon gone-lspci-again lspci -nvv -s "$function"
mark without
# Commands on the control queue wait in the kernel, some kernels without letting anything else run, until somebody
# answers them.
check back-down ip link set eth1 down
check back-up ip link set eth1 up
# The next device host is there: drivers that start anew have devices as new.
for pair in "$virtio $net" "$rng_virtio $rng"; do
    [ ! -e "${pair#* }/${pair% *}" ] || echo "${pair% *}" > "${pair#* }/unbind"
    echo "${pair% *}" > "${pair#* }/bind"
done
again() { await 10 name_nic "$TEST_MAC" eth1 && lease eth1 && ping -q -c 3 -i 0.1 10.0.2.2; }
check back-net again
random() { [ "$(dd if=/dev/hwrng bs=64 count=16 2> /dev/null | wc -c)" = 1024 ]; }
check back-rng random
