# SPDX-License-Identifier: Apache-2.0 OR MIT
# Disks that fail: what they cannot do gives an error, what they can do goes on, and when they are whole again all goes on.
# With exercises.sh.
full=$(disk_of full)
nbd=$(disk_of nbd)
[ -n "$full" ] && [ -n "$nbd" ] || fail "disks are missing: full '$full' nbd '$nbd'"
[ -e /root/some ] || head -c 4194304 /dev/urandom > /root/some
cp /root/some /tmp/some
sync

# put DISK MIB: writes there; get DISK MIB: what is there is what was written.
put() { dd if=/tmp/some of="/dev/$1" bs=1M seek="$2" oflag=direct 2>&1; }
get() { dd if="/dev/$1" bs=1M skip="$2" count=4 iflag=direct 2> /tmp/get.said | cmp - /tmp/some || { cat /tmp/get.said; return 1; }; }
# errs COMMAND…: fails, as the program says by an I/O error.
errs() {
    said=$("$@" 2>&1) && { echo "no error: $said"; return 1; }
    case $said in *"I/O error"* | *"Input/output error"* | *"No space left"*) ;; *) echo "$said"; return 1 ;; esac
}
fill() { for at in 4 8 12 16 20 24 28; do put "$full" $at || return 1; done; }

# The second boot: the first one ended while the server stood still.
if [ -e /root/rebooted ]; then
    check rebooted-root is "$(cat /root/rebooted)" "a file from before"
    check rebooted-nbd await 40 get "$nbd" 0
    check rebooted-nbd-write put "$nbd" 12
    check rebooted-nbd-read get "$nbd" 12
    check rebooted-full get "$full" 0
    check rebooted-dhcp lease eth1
    check rebooted-rng random 4
    return 0
fi
check dhcp lease eth1

check full-some put "$full" 0
check full-rest-fails errs fill
check full-some-is-kept get "$full" 0
check full-discard blkdiscard -o 4194304 -l 29360128 "/dev/$full"
check full-goes-on put "$full" 4
check full-goes-on-there get "$full" 4

check nbd-write put "$nbd" 0
check nbd-read get "$nbd" 0
check nbd-flush sync
mark break
read -r answer
check broken-read-fails errs get "$nbd" 0
check broken-write put "$nbd" 4
mark mend
read -r answer
check mended-read get "$nbd" 0
check mended-read-other get "$nbd" 4
mark stop
read -r answer
begun=$(cut -d . -f 1 /proc/uptime)
check gone-read-fails errs get "$nbd" 0
mark gone "$(($(cut -d . -f 1 /proc/uptime) - begun)) s"
check gone-write-fails errs put "$nbd" 8
check gone-others-go-on get "$full" 0
mark start
read -r answer
check back await 40 get "$nbd" 0
check back-other get "$nbd" 4
check back-write put "$nbd" 8
check back-read get "$nbd" 8

# A server that stands still: the request waits for a while, all else goes on.
mark hang
read -r answer
begun=$(cut -d . -f 1 /proc/uptime)
(errs get "$nbd" 0 > /tmp/hung.said 2>&1; echo $? > /tmp/hung.code) &
others() {
    put "$full" 4 && get "$full" 4 && dd if=/tmp/some of=/root/more bs=1M conv=fsync 2>&1 && cmp /tmp/some /root/more &&
        ping -q -c 3 -i 0.1 10.0.2.2 && fetch /tmp/fetched && random 16
}
for time in 1 2 3; do
    check hung-others-$time others
done
check hung-waits test ! -e /tmp/hung.code
wait
check hung-fails is "$(cat /tmp/hung.code /tmp/hung.said)" 0
mark hung "$(($(cut -d . -f 1 /proc/uptime) - begun)) s"
check hung-then-others others
mark wake
read -r answer
check woken await 40 get "$nbd" 0
check woken-write put "$nbd" 12
check woken-read get "$nbd" 12

# The machine starts anew while a request waits.
echo "a file from before" > /root/rebooted
sync
mark hang-again
read -r answer
get "$nbd" 0 > /dev/null 2>&1 &
inflight() { [ "$(awk '{ print $1 + $2 }' "/sys/block/$nbd/inflight")" -gt 0 ]; }
check hung-again await 10 inflight
mark rebooting
reboot -n -f
sleep 100
