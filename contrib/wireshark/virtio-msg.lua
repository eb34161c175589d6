-- SPDX-License-Identifier: Apache-2.0 OR MIT
-- Wireshark dissector for virtio-msg in traces of vmsg (docs/trace.md): link type USER0 with a head of 8 bytes.
--
-- Copy it into the folder of personal Lua plugins (Help > About > Folders), or name it when starting:
--   tshark -X lua_script:contrib/wireshark/virtio-msg.lua -r b0.pcapng

local proto = Proto("virtio_msg", "virtio over messages")

-- Names -------------------------------------------------------------------------------------------------------------

local LAYOUT = { [1] = "revision 1", [2] = "r1 (40 bytes)", [3] = "short (44 bytes)" }
local SIDE = { [0] = "driver", [1] = "device" }
local WAY = { [0] = "driver to device", [1] = "device to driver" }

local TRANSPORT = {
    [0x02] = "GET_DEVICE_INFO", [0x03] = "GET_DEVICE_FEATURES", [0x04] = "SET_DRIVER_FEATURES",
    [0x05] = "GET_CONFIG", [0x06] = "SET_CONFIG", [0x07] = "GET_DEVICE_STATUS", [0x08] = "SET_DEVICE_STATUS",
    [0x09] = "GET_VQUEUE", [0x0a] = "SET_VQUEUE", [0x0b] = "RESET_VQUEUE", [0x0c] = "GET_SHM",
    [0x40] = "EVENT_CONFIG", [0x41] = "EVENT_AVAIL", [0x42] = "EVENT_USED",
}
local BUS = {
    [0x02] = "GET_DEVICES", [0x03] = "PING", [0x40] = "EVENT_DEVICE",
    -- Of the unix bus: docs/bus-unix.md.
    [0x80] = "WINDOW_ADD", [0x81] = "WINDOW_REMOVE", [0x82] = "QUEUE_NOTIFY", [0x83] = "QUEUE_RESUME",
    [0x84] = "CLAIM", [0x85] = "DEVICE_NAME", [0x86] = "QUEUE_INFLIGHT",
    [0x87] = "BACKING_ADD", [0x88] = "BACKING_REMOVE", [0x89] = "VIEW_ADD", [0x8a] = "SHARED_MEMORY",
    -- Of the bus ivshmem: docs/bus-ivshmem.md.
    [0x8b] = "QUEUE_VECTORS",
}
local R1 = {
    [0x03] = "DEVICE_INFO", [0x04] = "GET_FEATURES", [0x05] = "SET_FEATURES", [0x06] = "GET_CONFIG",
    [0x07] = "SET_CONFIG", [0x08] = "GET_CONFIG_GEN", [0x09] = "GET_DEVICE_STATUS",
    [0x0a] = "SET_DEVICE_STATUS", [0x0b] = "GET_VQUEUE", [0x0c] = "SET_VQUEUE", [0x0d] = "RESET_VQUEUE",
    [0x10] = "EVENT_CONFIG", [0x11] = "EVENT_AVAIL", [0x12] = "EVENT_USED",
    [0x20] = "IOMMU_ENABLE", [0x21] = "IOMMU_TRANSLATE",
}
-- Requests of r1 that are never answered.
local R1_UNANSWERED = { [0x0a] = true, [0x0c] = true, [0x0d] = true, [0x20] = true }

local DEVICE_TYPE = {
    [1] = "network", [2] = "block", [3] = "console", [4] = "entropy", [5] = "balloon", [8] = "SCSI host",
    [9] = "9P", [16] = "GPU", [18] = "input", [19] = "socket", [20] = "crypto", [23] = "IOMMU", [24] = "memory",
    [25] = "sound", [26] = "file system", [27] = "pmem", [34] = "I2C", [41] = "GPIO",
}
local STATE = { [1] = "ready", [2] = "removed" }
local RESULT = {
    [0] = "done", [1] = "malformed", [2] = "no such device, queue, window, backing or region", [3] = "exists already or overlaps",
    [4] = "too many", [5] = "held by another driver", [6] = "descriptor cannot be used", [7] = "not supported",
    [8] = "not permitted", [9] = "not in this state",
}
local RESUME = { [0] = "at the given indices", [1] = "at the used index in the ring" }

-- Fields ------------------------------------------------------------------------------------------------------------

local f = {}
local function field(name, make, text, ...)
    f[name] = make("virtio_msg." .. name, text, ...)
end

field("head", ProtoField.none, "Head of the trace")
field("head.version", ProtoField.uint8, "Version of the head")
field("head.len", ProtoField.uint8, "Length of the head")
field("layout", ProtoField.uint8, "Layout", base.DEC, LAYOUT)
field("direction", ProtoField.uint8, "Direction", base.DEC, WAY)
field("fds", ProtoField.uint8, "File descriptors")
field("side", ProtoField.uint8, "Recorded by", base.DEC, SIDE)
field("connection", ProtoField.uint16, "Connection")
field("type", ProtoField.uint8, "Type", base.HEX)
field("type.response", ProtoField.bool, "Response", 8, nil, 0x01)
field("type.bus", ProtoField.bool, "Bus message", 8, nil, 0x02)
field("id", ProtoField.uint8, "Message id", base.HEX)
field("name", ProtoField.string, "Message")
field("dev", ProtoField.uint16, "Device number")
field("token", ProtoField.uint16, "Token")
field("size", ProtoField.uint16, "Message size")
field("payload", ProtoField.bytes, "Payload")
field("padding", ProtoField.bytes, "Padding")
field("request_in", ProtoField.framenum, "Response to the request in", base.NONE, frametype.REQUEST)
field("response_in", ProtoField.framenum, "Response in", base.NONE, frametype.RESPONSE)
field("response_time", ProtoField.relative_time, "Time since the request")

field("version", ProtoField.uint32, "Version")
field("device_id", ProtoField.uint32, "Device id", base.DEC, DEVICE_TYPE)
field("vendor_id", ProtoField.uint32, "Vendor id", base.HEX)
field("feature_bits", ProtoField.uint32, "Number of feature bits")
field("config_size", ProtoField.uint32, "Size of the configuration")
field("max_queues", ProtoField.uint32, "Virtqueues")
field("admin_first", ProtoField.uint16, "First administration queue")
field("admin_count", ProtoField.uint16, "Administration queues")

field("features.first", ProtoField.uint32, "First block of features")
field("features.count", ProtoField.uint32, "Blocks of features")
field("features.block", ProtoField.uint32, "Features", base.HEX)
field("features.word", ProtoField.uint64, "Features", base.HEX)
field("features.bit", ProtoField.uint32, "Feature bit")

field("generation", ProtoField.uint32, "Configuration generation")
field("offset", ProtoField.uint32, "Offset")
field("length", ProtoField.uint32, "Length")
field("data", ProtoField.bytes, "Configuration")
field("value", ProtoField.uint64, "Configuration", base.HEX)

field("status", ProtoField.uint32, "Device status", base.HEX)
field("status.acknowledge", ProtoField.bool, "ACKNOWLEDGE", 32, nil, 0x01)
field("status.driver", ProtoField.bool, "DRIVER", 32, nil, 0x02)
field("status.driver_ok", ProtoField.bool, "DRIVER_OK", 32, nil, 0x04)
field("status.features_ok", ProtoField.bool, "FEATURES_OK", 32, nil, 0x08)
field("status.suspend", ProtoField.bool, "SUSPEND", 32, nil, 0x10)
field("status.needs_reset", ProtoField.bool, "NEEDS_RESET", 32, nil, 0x40)
field("status.failed", ProtoField.bool, "FAILED", 32, nil, 0x80)

field("queue", ProtoField.uint32, "Queue")
field("queue.max_size", ProtoField.uint32, "Largest size")
field("queue.size", ProtoField.uint32, "Size")
field("queue.descriptor", ProtoField.uint64, "Descriptor area", base.HEX)
field("queue.driver", ProtoField.uint64, "Driver area", base.HEX)
field("queue.device", ProtoField.uint64, "Device area", base.HEX)
field("next", ProtoField.uint32, "Next", base.HEX)
field("next.offset", ProtoField.uint32, "Next offset", base.DEC, nil, 0x7fffffff)
field("next.wrap", ProtoField.bool, "Wrap counter", 32, nil, 0x80000000)
field("next_offset", ProtoField.uint64, "Next offset")
field("next_wrap", ProtoField.uint64, "Wrap counter")

field("shm", ProtoField.uint32, "Shared memory region")
field("shm.length", ProtoField.uint32, "Length")
field("shm.address", ProtoField.uint32, "Address", base.HEX)

field("devices.offset", ProtoField.uint16, "First device number")
field("devices.count", ProtoField.uint16, "Device numbers")
field("devices.next", ProtoField.uint16, "Go on at")
field("devices.bitmap", ProtoField.bytes, "Devices")
field("devices.present", ProtoField.uint16, "Present")
field("ping.data", ProtoField.uint32, "Data", base.HEX)
field("device", ProtoField.uint16, "Device")
field("state", ProtoField.uint16, "State", base.HEX, STATE)

field("subject", ProtoField.uint32, "Subject", base.HEX)
field("result", ProtoField.uint32, "Result", base.DEC, RESULT)
field("peer", ProtoField.string, "Name")
field("window", ProtoField.uint32, "Window")
field("window.flags", ProtoField.uint32, "Flags", base.HEX)
field("window.writable", ProtoField.bool, "Writable", 32, nil, 0x01)
field("window.more", ProtoField.bool, "More changes follow", 32, nil, 0x02)
field("window.base", ProtoField.uint64, "Bus address", base.HEX)
field("window.length", ProtoField.uint64, "Length", base.HEX)
field("window.file_offset", ProtoField.uint64, "Offset in the file", base.HEX)
field("window.backing", ProtoField.uint32, "Backing")
field("window.offset", ProtoField.uint64, "Offset in the backing", base.HEX)
field("backing", ProtoField.uint32, "Backing")
field("backing.flags", ProtoField.uint32, "Flags", base.HEX)
field("backing.writable", ProtoField.bool, "Writable", 32, nil, 0x01)
field("backing.length", ProtoField.uint64, "Length", base.HEX)
field("backing.file_offset", ProtoField.uint64, "Offset in the file", base.HEX)
field("region", ProtoField.uint32, "Shared-memory region")
field("region.length", ProtoField.uint64, "Length", base.HEX)
field("region.file_offset", ProtoField.uint64, "Offset in the file", base.HEX)
field("vectors.queue", ProtoField.uint16, "Queue")
field("vectors.kick", ProtoField.uint16, "Kick vector")
field("vectors.call", ProtoField.uint16, "Call vector")
field("notify.flags", ProtoField.uint16, "Flags", base.HEX)
field("notify.kick", ProtoField.bool, "Kick eventfd", 16, nil, 0x01)
field("notify.call", ProtoField.bool, "Call eventfd", 16, nil, 0x02)
field("resume.mode", ProtoField.uint16, "Mode", base.DEC, RESUME)
field("resume.avail_idx", ProtoField.uint16, "Available index")
field("resume.used_idx", ProtoField.uint16, "Used index")
field("claim.flags", ProtoField.uint16, "Flags", base.HEX)
field("claim.release", ProtoField.bool, "Release", 16, nil, 0x01)
field("inflight.flags", ProtoField.uint16, "Flags", base.HEX)
field("inflight.resume", ProtoField.bool, "Resume", 16, nil, 0x01)
field("inflight.offset", ProtoField.uint64, "Offset in the file", base.HEX)
field("inflight.length", ProtoField.uint64, "Length", base.HEX)
field("zero", ProtoField.uint32, "Zero", base.HEX)

field("iommu.enable", ProtoField.uint8, "Translate addresses")
field("iommu.va", ProtoField.uint64, "Address", base.HEX)
field("iommu.pa", ProtoField.uint64, "Bus address", base.HEX)
field("iommu.prot", ProtoField.uint8, "Access", base.HEX)

local all = {}
for _, made in pairs(f) do
    all[#all + 1] = made
end
proto.fields = all

local bad_head = ProtoExpert.new("virtio_msg.bad_head", "Not the head of a message", expert.group.MALFORMED, expert.severity.ERROR)
local bad_size = ProtoExpert.new("virtio_msg.bad_size", "Wrong size", expert.group.MALFORMED, expert.severity.ERROR)
local bad_id = ProtoExpert.new("virtio_msg.bad_id", "Unknown message", expert.group.MALFORMED, expert.severity.ERROR)
local no_request = ProtoExpert.new("virtio_msg.no_request", "Response without a request in the trace", expert.group.SEQUENCE, expert.severity.NOTE)
proto.experts = { bad_head, bad_size, bad_id, no_request }

-- Payloads ----------------------------------------------------------------------------------------------------------

-- A payload that is being dissected. Its functions add a field at the current place and return its value; they raise
-- `short` if it does not fit, which `payload` below turns into an expert item.
local short = {}
local Cursor = {}
Cursor.__index = Cursor

function Cursor:left()
    return self.range and self.range:len() - self.at or 0
end

function Cursor:take(len)
    if len > self:left() then
        error(short)
    end
    local range = self.range(self.at, len)
    self.at = self.at + len
    return range
end

function Cursor:number(name, len)
    local range = self:take(len)
    local item = self.tree:add_le(f[name], range)
    if len == 8 then
        return range:le_uint64(), item, range
    end
    return range:le_uint(), item, range
end

function Cursor:u8(name) return self:number(name, 1) end
function Cursor:u16(name) return self:number(name, 2) end
function Cursor:u32(name) return self:number(name, 4) end
function Cursor:u64(name) return self:number(name, 8) end

-- A number with bits in it that are shown below.
function Cursor:flags(name, len, bits)
    local value, item, range = self:number(name, len)
    for _, bit_name in ipairs(bits) do
        item:add_le(f[bit_name], range)
    end
    return value
end

-- All that is left as bytes.
function Cursor:rest(name)
    local len = self:left()
    if len > 0 then
        local range = self:take(len)
        self.tree:add(f[name], range)
        return range
    end
end

local function hex(range)
    if not range then
        return ""
    end
    local text = tostring(range:bytes()):lower()
    if #text > 32 then
        text = text:sub(1, 32) .. "…"
    end
    return ": " .. text
end

local STATUS_BITS = {
    "status.acknowledge", "status.driver", "status.driver_ok", "status.features_ok", "status.suspend",
    "status.needs_reset", "status.failed",
}
local STATUS_NAMES = {
    { 1, "ACKNOWLEDGE" }, { 2, "DRIVER" }, { 8, "FEATURES_OK" }, { 4, "DRIVER_OK" }, { 16, "SUSPEND" },
    { 64, "NEEDS_RESET" }, { 128, "FAILED" },
}

local function status(c)
    local value = c:flags("status", 4, STATUS_BITS)
    local names = {}
    for _, known in ipairs(STATUS_NAMES) do
        if math.floor(value / known[1]) % 2 == 1 then
            names[#names + 1] = known[2]
        end
    end
    local text = #names > 0 and table.concat(names, "|") or "reset"
    return string.format("status 0x%02x (%s)", value, text)
end

-- The set bits of a word, each as a field of its own. `set` gets their numbers.
local function bits(item, range, first, set)
    for i = 0, range:len() * 8 - 1 do
        local byte = range(math.floor(i / 8), 1):uint()
        if math.floor(byte / 2 ^ (i % 8)) % 2 == 1 then
            -- Numbers past 32 bits are of blocks that no device has.
            if first + i < 2 ^ 32 then
                item:add(f["features.bit"], range, first + i):set_generated()
            end
            set[#set + 1] = string.format("%d", first + i)
        end
    end
end

local function blocks(c, with_words)
    local first = c:u32("features.first")
    local count = c:u32("features.count")
    local text = string.format("blocks %d+%d", first, count)
    if not with_words then
        return text
    end
    local set, words = {}, 0
    while c:left() >= 4 and words < count do
        local _, item, range = c:u32("features.block")
        bits(item, range, (first + words) * 32, set)
        words = words + 1
    end
    if words ~= count then
        error(short)
    end
    return text .. ", bits " .. (#set > 0 and table.concat(set, " ") or "none")
end

local function none()
    return nil
end

local function queue(c)
    return string.format("queue %d", c:u32("queue"))
end

local function areas(c)
    local descriptor = c:u64("queue.descriptor")
    local driver = c:u64("queue.driver")
    local device = c:u64("queue.device")
    return string.format("descriptor 0x%s, driver 0x%s, device 0x%s", descriptor:tohex(), driver:tohex(), device:tohex())
end

-- What follows `length` bytes of configuration: exactly so many.
local function config(c, text, length, may_be_left_out)
    if not (may_be_left_out and c:left() == 0) and c:left() ~= length then
        error(short)
    end
    return text .. hex(c:rest("data"))
end

local function config_piece(c, may_be_left_out)
    local generation = c:u32("generation")
    local offset = c:u32("offset")
    local length = c:u32("length")
    local text = string.format("generation %d, offset %d, length %d", generation, offset, length)
    return config(c, text, length, may_be_left_out)
end

-- By message id: what the request has, what the response has. A missing one: there is no such message.
local TRANSPORT_PAYLOAD = {
    [0x02] = { none, function(c)
        local device_id = c:u32("device_id")
        local vendor = c:u32("vendor_id")
        local feature_bits = c:u32("feature_bits")
        local config_size = c:u32("config_size")
        local queues = c:u32("max_queues")
        c:u16("admin_first")
        c:u16("admin_count")
        if device_id == 0 then
            return "no device"
        end
        return string.format("device id %d (%s), vendor 0x%08x, %d feature bits, %d config bytes, %d queues",
            device_id, DEVICE_TYPE[device_id] or "unknown", vendor, feature_bits, config_size, queues)
    end },
    [0x03] = { function(c) return blocks(c, false) end, function(c) return blocks(c, true) end },
    [0x04] = { function(c) return blocks(c, true) end, none },
    [0x05] = { function(c)
        local offset = c:u32("offset")
        return string.format("offset %d, length %d", offset, c:u32("length"))
    end, function(c) return config_piece(c, false) end },
    [0x06] = { function(c) return config_piece(c, false) end, function(c) return config_piece(c, true) end },
    [0x07] = { none, status },
    [0x08] = { status, status },
    [0x09] = { queue, function(c)
        local text = queue(c)
        local max = c:u32("queue.max_size")
        local size = c:u32("queue.size")
        c:u32("zero")
        local where = areas(c)
        if max == 0 then
            return text .. ", no such queue"
        elseif size == 0 then
            return string.format("%s, size 0 of %d", text, max)
        end
        return string.format("%s, size %d of %d, %s", text, size, max, where)
    end },
    [0x0a] = { function(c)
        local text = queue(c)
        c:u32("zero")
        local size = c:u32("queue.size")
        c:u32("zero")
        return string.format("%s, size %d, %s", text, size, areas(c))
    end, none },
    [0x0b] = { queue, none },
    [0x0c] = { function(c) return string.format("region %d", c:u32("shm")) end, function(c)
        local index = c:u32("shm")
        local length = c:u32("shm.length")
        local address = c:u32("shm.address")
        if length == 0 then
            return string.format("region %d, no such region", index)
        end
        return string.format("region %d, length %d, address 0x%x", index, length, address)
    end },
    [0x40] = { function(c)
        local text = status(c)
        local generation = c:u32("generation")
        local offset = c:u32("offset")
        local length = c:u32("length")
        text = string.format("%s, generation %d, offset %d, length %d", text, generation, offset, length)
        return config(c, text, length, true)
    end },
    [0x41] = { function(c)
        local text = queue(c)
        local next = c:flags("next", 4, { "next.offset", "next.wrap" })
        if next == 0 then
            return text
        end
        return string.format("%s, next %d, wrap %d", text, next % 2 ^ 31, next >= 2 ^ 31 and 1 or 0)
    end },
    [0x42] = { queue },
}

-- What every response of the unix bus begins with. `window`: it is about a window, not a device.
local function result(c, window)
    local subject
    if window then
        subject = string.format("window %d", c:u32("window"))
    else
        subject = string.format("device %d", c:u16("device"))
        c:u16("zero")
    end
    local value = c:u32("result")
    return string.format("%s, %s", subject, RESULT[value] or "status " .. value), value
end

local function backing_result(c)
    local id = c:u32("backing")
    local value = c:u32("result")
    return string.format("backing %d, %s", id, RESULT[value] or "status " .. value)
end

local function named_result(c)
    local text = result(c, false)
    local len = c:left()
    if len > 0 then
        local range = c:take(len)
        c.tree:add(f.peer, range)
        text = text .. ": " .. range:string(ENC_UTF_8)
    end
    return text
end

-- The first u32 of the request again: the device, and what came with it there.
local function queue_result(flags)
    return function(c)
        local device = c:u16("device")
        c:u16(flags)
        local value = c:u32("result")
        return string.format("device %d, %s", device, RESULT[value] or "status " .. value)
    end
end

local BUS_PAYLOAD = {
    [0x02] = { function(c)
        local offset = c:u16("devices.offset")
        return string.format("devices %d+%d", offset, c:u16("devices.count"))
    end, function(c)
        local offset = c:u16("devices.offset")
        local count = c:u16("devices.count")
        local next = c:u16("devices.next")
        if c:left() ~= math.ceil(count / 8) then
            error(short)
        end
        local present = {}
        local len = c:left()
        if len > 0 then
            local range = c:take(len)
            local item = c.tree:add(f["devices.bitmap"], range)
            for i = 0, count - 1 do
                local byte = range(math.floor(i / 8), 1):uint()
                if math.floor(byte / 2 ^ (i % 8)) % 2 == 1 then
                    item:add(f["devices.present"], range, (offset + i) % 65536):set_generated()
                    if #present < 32 then
                        present[#present + 1] = tostring(offset + i)
                    end
                end
            end
        end
        return string.format("devices %d+%d, next %d, present %s", offset, count, next,
            #present > 0 and table.concat(present, " ") or "none")
    end },
    [0x03] = { function(c) return string.format("data 0x%08x", c:u32("ping.data")) end,
        function(c) return string.format("data 0x%08x", c:u32("ping.data")) end },
    [0x40] = { function(c)
        local device = c:u16("device")
        local state = c:u16("state")
        return string.format("device %d %s", device, STATE[state] or string.format("state 0x%04x", state))
    end },
    [0x80] = { function(c)
        local id = c:u32("window")
        local flags = c:flags("window.flags", 4, { "window.writable", "window.more" })
        local base_address = c:u64("window.base")
        local length = c:u64("window.length")
        local file_offset = c:u64("window.file_offset")
        return string.format("window %d, 0x%s bytes at 0x%s, file offset 0x%s%s%s", id, length:tohex(), base_address:tohex(),
            file_offset:tohex(), flags % 2 == 1 and ", writable" or "", math.floor(flags / 2) % 2 == 1 and ", more" or "")
    end, function(c) return result(c, true) end },
    [0x81] = { function(c)
        local id = c:u32("window")
        local flags = c:flags("window.flags", 4, { "window.more" })
        return string.format("window %d%s", id, math.floor(flags / 2) % 2 == 1 and ", more" or "")
    end, function(c) return result(c, true) end },
    [0x82] = { function(c)
        local device = c:u16("device")
        local flags = c:flags("notify.flags", 2, { "notify.kick", "notify.call" })
        return string.format("device %d, %s%s%s", device, queue(c), flags % 2 == 1 and ", kick" or "",
            math.floor(flags / 2) % 2 == 1 and ", call" or "")
    end, queue_result("notify.flags") },
    [0x83] = { function(c)
        local device = c:u16("device")
        local mode = c:u16("resume.mode")
        local text = string.format("device %d, %s", device, queue(c))
        local avail = c:u16("resume.avail_idx")
        local used = c:u16("resume.used_idx")
        if mode == 1 then
            return text .. ", used index of the ring"
        end
        return string.format("%s, avail %d, used %d", text, avail, used)
    end, queue_result("resume.mode") },
    [0x84] = { function(c)
        local device = c:u16("device")
        local flags = c:flags("claim.flags", 2, { "claim.release" })
        return string.format("device %d%s", device, flags % 2 == 1 and ", release" or "")
    end, named_result },
    [0x85] = { function(c)
        local device = c:u16("device")
        c:u16("zero")
        return string.format("device %d", device)
    end, named_result },
    [0x86] = { function(c)
        local device = c:u16("device")
        local flags = c:flags("inflight.flags", 2, { "inflight.resume" })
        local text = string.format("device %d, %s%s", device, queue(c), flags % 2 == 1 and ", resume" or "")
        local offset = c:u64("inflight.offset")
        local length = c:u64("inflight.length")
        return string.format("%s, 0x%s bytes at file offset 0x%s", text, length:tohex(), offset:tohex())
    end, queue_result("inflight.flags") },
    [0x87] = { function(c)
        local id = c:u32("backing")
        local flags = c:flags("backing.flags", 4, { "backing.writable" })
        local length = c:u64("backing.length")
        local file_offset = c:u64("backing.file_offset")
        return string.format("backing %d, 0x%s bytes at file offset 0x%s%s", id, length:tohex(), file_offset:tohex(),
            flags % 2 == 1 and ", writable" or "")
    end, backing_result },
    [0x88] = { function(c)
        local id = c:u32("backing")
        c:u32("backing.flags")
        return string.format("backing %d", id)
    end, backing_result },
    [0x89] = { function(c)
        local id = c:u32("window")
        local flags = c:flags("window.flags", 4, { "window.writable", "window.more" })
        local backing = c:u32("window.backing")
        c:u32("zero")
        local base_address = c:u64("window.base")
        local length = c:u64("window.length")
        local offset = c:u64("window.offset")
        local whole = backing == 0xffffffff and "the common memory" or "backing " .. backing
        return string.format("window %d, 0x%s bytes at 0x%s, offset 0x%s of %s%s%s", id, length:tohex(),
            base_address:tohex(), offset:tohex(), whole, flags % 2 == 1 and ", writable" or "",
            math.floor(flags / 2) % 2 == 1 and ", more" or "")
    end, function(c) return result(c, true) end },
    [0x8a] = { function(c)
        local device = c:u16("device")
        c:u16("zero")
        return string.format("device %d, region %d", device, c:u32("region"))
    end, function(c)
        local text, value = result(c, false)
        if value ~= 0 then
            return text
        end
        local length = c:u64("region.length")
        return string.format("%s, 0x%s bytes at file offset 0x%s", text, length:tohex(), c:u64("region.file_offset"):tohex())
    end },
    [0x8b] = { function(c)
        local device = c:u16("device")
        local number = c:u16("vectors.queue")
        local kick = c:u16("vectors.kick")
        local call = c:u16("vectors.call")
        return string.format("device %d, queue %d, %s, %s", device, number,
            kick == 0xffff and "kicks by message" or "kick vector " .. kick,
            call == 0xffff and "calls by message" or "call vector " .. call)
    end, queue_result("vectors.queue") },
}

local function r1_features(c)
    local index = c:u32("features.first")
    local _, item, range = c:u64("features.word")
    local set = {}
    bits(item, range, index * 64, set)
    return string.format("word %d, bits %s", index, #set > 0 and table.concat(set, " ") or "none")
end

-- An offset of 24 bits and a length of 8.
local function r1_range(c)
    local offset = c:take(3)
    c.tree:add_le(f.offset, offset)
    return string.format("offset %d, length %d", offset:le_uint(), c:u8("length"))
end

local function r1_config(c)
    local text = r1_range(c)
    return string.format("%s: 0x%s", text, c:u64("value"):tohex())
end

local R1_PAYLOAD = {
    [0x03] = { none, function(c)
        local version = c:u32("version")
        local device_id = c:u32("device_id")
        return string.format("version %d, device id %d (%s), vendor 0x%08x", version, device_id,
            DEVICE_TYPE[device_id] or "unknown", c:u32("vendor_id"))
    end },
    [0x04] = { function(c) return string.format("word %d", c:u32("features.first")) end, r1_features },
    [0x05] = { r1_features, r1_features },
    [0x06] = { r1_range, r1_config },
    [0x07] = { r1_config, r1_config },
    [0x08] = { none, function(c) return string.format("generation %d", c:u32("generation")) end },
    [0x09] = { none, status },
    [0x0a] = { status },
    [0x0b] = { queue, function(c)
        local text = queue(c)
        return string.format("%s, largest size %d", text, c:u32("queue.max_size"))
    end },
    [0x0c] = { function(c)
        local text = queue(c)
        local size = c:u32("queue.size")
        return string.format("%s, size %d, %s", text, size, areas(c))
    end },
    [0x0d] = { queue },
    [0x10] = { function(c)
        local text = status(c) .. ", " .. r1_range(c)
        local range = c:take(16)
        c.tree:add(f.data, range)
        return text
    end },
    [0x11] = { function(c)
        local text = queue(c)
        c:u64("next_offset")
        c:u64("next_wrap")
        return text
    end },
    [0x12] = { queue },
    [0x20] = { function(c) return c:u8("iommu.enable") ~= 0 and "on" or "off" end },
    [0x21] = { function(c)
        local va = c:u64("iommu.va")
        return string.format("address 0x%s, access %d", va:tohex(), c:u8("iommu.prot"))
    end, function(c)
        local va = c:u64("iommu.va")
        local pa = c:u64("iommu.pa")
        return string.format("address 0x%s is 0x%s, access %d", va:tohex(), pa:tohex(), c:u8("iommu.prot"))
    end },
}

-- The short layout has the payloads of revision 1 with these exceptions: there is no reserved word before the addresses of
-- a queue, features go on to the end whatever their count, and fixed sizes are filled up.
local function short_queue(c)
    local text = queue(c)
    local max = c:u32("queue.max_size")
    local size = c:u32("queue.size")
    return string.format("%s, size %d of %d, %s", text, size, max, areas(c))
end

local function short_blocks(c)
    local first = c:u32("features.first")
    local text = string.format("blocks %d+%d", first, c:u32("features.count"))
    local set, words = {}, 0
    while c:left() > 0 do
        local _, item, range = c:u32("features.block")
        bits(item, range, (first + words) * 32, set)
        words = words + 1
    end
    return text .. ", bits " .. (#set > 0 and table.concat(set, " ") or "none")
end

local function short_data(c, text, length)
    local len = math.min(length, c:left())
    if len > 0 then
        local range = c:take(len)
        c.tree:add(f.data, range)
        text = text .. hex(range)
    end
    c:rest("padding")
    return text
end

local function short_config(c)
    local generation = c:u32("generation")
    local offset = c:u32("offset")
    local length = c:u32("length")
    return short_data(c, string.format("generation %d, offset %d, length %d", generation, offset, length), length)
end

local function short_done(c)
    c:rest("padding")
end

local SHORT_PAYLOAD = setmetatable({
    [0x03] = { TRANSPORT_PAYLOAD[0x03][1], short_blocks },
    [0x04] = { short_blocks, short_done },
    [0x05] = { TRANSPORT_PAYLOAD[0x05][1], short_config },
    [0x06] = { short_config, short_config },
    [0x09] = { queue, short_queue },
    [0x0a] = { short_queue, short_done },
    [0x40] = { function(c)
        local text = status(c)
        local generation = c:u32("generation")
        local offset = c:u32("offset")
        local length = c:u32("length")
        return short_data(c, string.format("%s, generation %d, offset %d, length %d", text, generation, offset, length), length)
    end },
}, { __index = TRANSPORT_PAYLOAD })

-- Dissects `range` (nil: empty) by one of the functions above. Returns its text, and whether all fitted.
local function payload(fields, range, tree, exact)
    local c = setmetatable({ range = range, at = 0, tree = tree }, Cursor)
    local ok, text = pcall(fields, c)
    if not ok then
        if text ~= short then
            error(text, 0)
        end
        return nil, false
    end
    if exact and c:left() > 0 then
        c:rest("padding")
        return text, false
    end
    c:rest("padding")
    return text, true
end

-- Requests and responses --------------------------------------------------------------------------------------------

-- Requests without a response yet, by what they have in common with it; pairs that were found, both ways.
local waiting, answer_of, request_of, time_of

local function forget()
    waiting, answer_of, request_of, time_of = {}, {}, {}, {}
end
forget()
-- Another file is opened, or the same again.
proto.init = forget

-- Notes a message at its first dissection, and adds the links to its tree.
local function link(pinfo, tree, message)
    local number = pinfo.number
    if not pinfo.visited and not message.event then
        local key = table.concat({
            message.side, message.connection,
            -- The way of the request.
            message.response and 1 - message.way or message.way,
            message.bus and 1 or 0, message.dev, message.token or "-", message.id,
        }, "/")
        if message.response then
            local request = waiting[key]
            if request then
                waiting[key] = nil
                request_of[number] = request
                answer_of[request] = number
            end
        else
            waiting[key] = number
        end
        -- Fields of the frame are not there at the first pass, which builds no tree.
        time_of[number] = pinfo.rel_ts
    end
    if answer_of[number] then
        tree:add(f.response_in, answer_of[number]):set_generated()
    end
    local request = request_of[number]
    if request then
        tree:add(f.request_in, request):set_generated()
        if time_of[request] and time_of[number] then
            local ns = math.floor((time_of[number] - time_of[request]) * 1e9 + 0.5)
            local seconds = math.floor(ns / 1e9)
            tree:add(f.response_time, NSTime.new(seconds, ns - seconds * 1e9)):set_generated()
        end
    elseif message.response then
        tree:add_proto_expert_info(no_request)
    end
end

-- Messages ----------------------------------------------------------------------------------------------------------

-- Length of the header, and whether it has a token and a size.
local HEADER = {
    [1] = { len = 8, token = 4, size = 6 },
    [2] = { len = 4, whole = 40 },
    [3] = { len = 6, size = 4 },
}

function proto.dissector(buffer, pinfo, tree)
    local len = buffer:len()
    local top = tree:add(proto, buffer())
    pinfo.cols.protocol = "virtio-msg"
    local head_len = len >= 8 and buffer(1, 1):uint() or 0
    if len < 8 or buffer(0, 1):uint() ~= 1 or head_len < 8 or head_len > len or not HEADER[buffer(2, 1):uint()] then
        top:add_proto_expert_info(bad_head)
        pinfo.cols.info = "not the head of a message"
        return len
    end
    local layout, way, fds = buffer(2, 1):uint(), buffer(3, 1):uint(), buffer(4, 1):uint()
    local head = top:add(f.head, buffer(0, head_len))
    head:add(f["head.version"], buffer(0, 1))
    head:add(f["head.len"], buffer(1, 1))
    head:add(f.layout, buffer(2, 1))
    head:add(f.direction, buffer(3, 1))
    head:add(f.fds, buffer(4, 1))
    head:add(f.side, buffer(5, 1))
    head:add_le(f.connection, buffer(6, 2))
    pinfo.cols.src = way == 0 and "driver" or "device"
    pinfo.cols.dst = way == 0 and "device" or "driver"

    local header = HEADER[layout]
    local at = head_len
    if len - at < (header.whole or header.len) then
        top:add_proto_expert_info(bad_size, "Shorter than a header, or than the layout")
        if len > at then
            top:add(f.payload, buffer(at))
        end
        pinfo.cols.info = "message cut short"
        return len
    end
    local kind = buffer(at, 1):uint()
    local id = buffer(at + 1, 1):uint()
    local response, bus = kind % 2 == 1, math.floor(kind / 2) % 2 == 1
    local dev = buffer(at + 2, 2):le_uint()
    local token = header.token and buffer(at + header.token, 2):le_uint()
    local message = { side = buffer(5, 1):uint(), connection = buffer(6, 2):le_uint(), way = way, response = response, bus = bus, dev = dev, token = token, id = id }

    local names, fields
    if layout == 2 then
        names, fields = bus and {} or R1, bus and {} or R1_PAYLOAD
        message.event = (id >= 0x10 and id <= 0x12) or R1_UNANSWERED[id]
    else
        names, fields = bus and BUS or TRANSPORT, bus and BUS_PAYLOAD or TRANSPORT_PAYLOAD
        if layout == 3 and not bus then
            fields = SHORT_PAYLOAD
        end
        message.event = (id >= 0x40 and id < 0x80) or id >= 0xc0
    end

    local item = top:add(f.type, buffer(at, 1))
    item:add(f["type.response"], buffer(at, 1))
    item:add(f["type.bus"], buffer(at, 1))
    top:add(f.id, buffer(at + 1, 1))
    local name = names[id] or string.format("message 0x%02x", id)
    top:add(f.name, buffer(at + 1, 1), name):set_generated()
    top:add_le(f.dev, buffer(at + 2, 2))
    if token then
        top:add_le(f.token, buffer(at + header.token, 2))
    end
    local size = header.whole or len - at
    if header.size then
        size = buffer(at + header.size, 2):le_uint()
        local size_item = top:add_le(f.size, buffer(at + header.size, 2))
        if size < header.len or size > len - at then
            size_item:add_proto_expert_info(bad_size, "The size is not that of the message")
            size = len - at
        end
    end

    local range
    if size > header.len then
        range = buffer(at + header.len, size - header.len)
    end
    local dissect = fields[id] and fields[id][response and 2 or 1]
    local text, fits
    if dissect then
        text, fits = payload(dissect, range, top, layout ~= 2)
        if not fits then
            top:add_proto_expert_info(bad_size, "The payload has not the size that this message has")
        end
    else
        if range then
            top:add(f.payload, range)
        end
        -- Ids from 0x80 on belong to each bus.
        if not (bus and id >= 0x80 and layout ~= 2) then
            top:add_proto_expert_info(bad_id)
        end
    end
    if len - at > size then
        top:add(f.padding, buffer(at + size))
    end
    link(pinfo, top, message)

    local info = bus and "bus " or string.format("dev %d ", dev)
    if token and not message.event then
        info = info .. string.format("#%d ", token)
    end
    info = info .. name
    if response then
        info = info .. " response"
    end
    if text then
        info = info .. ": " .. text
    end
    if fds > 0 then
        info = info .. string.format(" (%d descriptor%s)", fds, fds > 1 and "s" or "")
    end
    pinfo.cols.info = info
    top:append_text(", " .. info)
    return len
end

DissectorTable.get("wtap_encap"):add(wtap.USER0, proto)
