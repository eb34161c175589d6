# SPDX-License-Identifier: Apache-2.0 OR MIT
# Makes the disk with the serial number ROOT the root file system, and hands over to the first process there. What that
# is to do goes along in /run.
await 30 disk_of "$ROOT" || fail "no disk with the serial number $ROOT: $(cat /sys/block/*/serial 2>&1)"
mkdir -p /root
why=$(mount -t ext4 "/dev/$(disk_of "$ROOT")" /root 2>&1) || fail "the root disk cannot be mounted: $why"
mount -t tmpfs tmpfs /root/run
cp /settings /library /lease /root/run
[ ! -e /obey ] || cp /obey /root/run
cat > /root/run/script << 'END_OF_SCRIPT'
@SCRIPT@
END_OF_SCRIPT
for dir in dev proc sys; do
    mount --move /$dir /root/$dir
done
exec switch_root -c /dev/console /root /sbin/init
