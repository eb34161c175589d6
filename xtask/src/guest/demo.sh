# SPDX-License-Identifier: Apache-2.0 OR MIT
# The demo: an address by DHCP, pings, a file over HTTP with its checksum, random bytes. GATEWAY is pinged, 10.0.2.2 unless it is set.
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
device=$(readlink -f /sys/class/net/eth1/device)
mark nic "$device"
group=$(readlink -f "${device%/*}/iommu_group")
[ ! -e "$group/type" ] || mark iommu "group ${group##*/}, $(cat "$group/type")"
lease eth1 || fail "no address by DHCP"
mark lease "$(cat /tmp/lease.eth1)"
ping -c "$PINGS" -i 0.2 "${GATEWAY:-10.0.2.2}"
mark pinged $?
mark fetching
wget -q -O /tmp/file "http://10.0.2.2:$PORT/file"
mark fetched $?
mark sum "$(sha256sum < /tmp/file)"
rm /tmp/file
mark random "$(dd if=/dev/hwrng bs=64 count=16 2> /dev/null | wc -c) $(cat /sys/class/misc/hw_random/rng_current)"
