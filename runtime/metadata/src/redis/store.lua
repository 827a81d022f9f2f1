-- All operations of a store, each atomic. KEYS[1] is the prefix P, ARGV[1] the operation.
--
--   P rev            the one counter: revisions, fences and leases are drawn from it
--   P run, P up      the server's run id at the last look, and when it was first seen (ms)
--   P row:NAME       f fence, i instance, t ttl (ms), v version, b record, r "1" if released
--   P names          names that are not released, in order
--   P rows           how many names ever were
--   P leases         names whose lease is counted as alive, by deadline (ms)
--   P readers:NAME   reader -> "fence version ttl deadline"
--   P cell:NAME      v version, b value
--   P log            the newest changes; entry REV-0
--
-- Numbers of clients are strings and compared as strings: a Lua number is exact to 2^53 only. Records are
-- never looked into.

local P, op = KEYS[1], ARGV[1]
local LOG_LEN = 1024

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function int(number)
  return string.format('%.0f', number)
end

-- Decimal strings without leading zeros: by length, then by digits.
local function less(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end

local function log(...)
  local rev = int(redis.call('INCR', P .. 'rev'))
  redis.call('XADD', P .. 'log', 'MAXLEN', LOG_LEN, rev .. '-0', ...)
  return rev
end

-- A restarted server counts every lease from the start: nobody could renew while it was away.
local function rearm()
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  if redis.call('GET', P .. 'run') == run then return end
  for _, name in ipairs(redis.call('ZRANGE', P .. 'leases', 0, -1)) do
    redis.call('ZADD', P .. 'leases', now + redis.call('HGET', P .. 'row:' .. name, 't'), name)
    local readers = redis.call('HGETALL', P .. 'readers:' .. name)
    for i = 1, #readers, 2 do
      local f, v, t = string.match(readers[i + 1], '(%d+) (%d+) (%d+)')
      redis.call('HSET', P .. 'readers:' .. name, readers[i], f .. ' ' .. v .. ' ' .. t .. ' ' .. int(now + t))
    end
  end
  redis.call('SET', P .. 'run', run)
  redis.call('SET', P .. 'up', int(now))
end

local function expire()
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', P .. 'leases', '-inf', now)) do
    redis.call('ZREM', P .. 'leases', name)
    log('k', 'expired', 'n', name, 'f', redis.call('HGET', P .. 'row:' .. name, 'f'))
  end
end

-- What is left of a lease, in ms; nil if it ran out or was given back.
local function left(name)
  local deadline = redis.call('ZSCORE', P .. 'leases', name)
  if deadline and tonumber(deadline) > now then return tonumber(deadline) - now end
  return nil
end

local function row(name)
  local r = redis.call('HMGET', P .. 'row:' .. name, 'f', 'i', 't', 'v', 'b', 'r')
  if not r[1] then return nil end
  return { fence = r[1], instance = r[2], ttl = r[3], version = r[4], record = r[5], released = r[6] == '1' }
end

-- The refusal for a hold (name, fence, lease, instance), or nil and the row.
local function refuse(name, fence, lease, instance)
  local r = row(name)
  if not r then return { 'notfound' } end
  if fence ~= r.fence then return { 'fenced', r.fence } end
  if not left(name) or lease ~= r.fence or instance ~= r.instance then return { 'expired', r.fence } end
  return nil, r
end

local function snapshot(name, r)
  return name, r.fence, r.version, r.instance, r.record
end

local function append(list, ...)
  for _, value in ipairs({ ... }) do list[#list + 1] = value end
end

local ops = {}

function ops.claim(name, instance, ttl, takeover, limit)
  local r, remaining = row(name), left(name)
  if remaining then
    if r.instance == instance then
      redis.call('ZADD', P .. 'leases', now + r.ttl, name)
      return { 'ok', r.fence, r.ttl }
    end
    if takeover ~= '1' then return { 'held', r.fence, int(remaining) } end
  end
  if not r then
    local rows = tonumber(redis.call('GET', P .. 'rows') or '0') + 1
    if rows > tonumber(limit) then return { 'names', int(rows) } end
    redis.call('INCR', P .. 'rows')
  end
  local fence = int(tonumber(redis.call('GET', P .. 'rev') or '0') + 1)
  redis.call('HSET', P .. 'row:' .. name, 'f', fence, 'i', instance, 't', ttl, 'v', '0', 'b', '', 'r', '0')
  redis.call('ZADD', P .. 'names', 0, name)
  redis.call('ZADD', P .. 'leases', now + ttl, name)
  log('k', 'put', 'n', name, 'f', fence, 'v', '0', 'i', instance, 'b', '')
  return { 'ok', fence, ttl }
end

function ops.publish(name, fence, lease, instance, expect, record)
  local refusal, r = refuse(name, fence, lease, instance)
  if refusal then return refusal end
  if expect ~= r.version then return { 'conflict', r.version } end
  redis.call('HINCRBY', P .. 'row:' .. name, 'v', 1)
  redis.call('HSET', P .. 'row:' .. name, 'b', record)
  local version = redis.call('HGET', P .. 'row:' .. name, 'v')
  log('k', 'put', 'n', name, 'f', fence, 'v', version, 'i', instance, 'b', record)
  return { 'ok', version }
end

function ops.renew(name, fence, lease, instance)
  local refusal, r = refuse(name, fence, lease, instance)
  if refusal then return refusal end
  redis.call('ZADD', P .. 'leases', now + r.ttl, name)
  return { 'ok' }
end

function ops.release(name, fence, lease, instance)
  local refusal = refuse(name, fence, lease, instance)
  if refusal then return refusal end
  redis.call('HSET', P .. 'row:' .. name, 'r', '1', 'b', '')
  redis.call('ZREM', P .. 'names', name)
  redis.call('ZREM', P .. 'leases', name)
  log('k', 'released', 'n', name, 'f', fence)
  return { 'ok' }
end

function ops.get(...)
  local outcomes = { 'ok' }
  for _, name in ipairs({ ... }) do
    local r, remaining = row(name), left(name)
    if not r or r.released then
      append(outcomes, { 'notfound' })
    elseif not remaining then
      append(outcomes, { 'expired', r.fence })
    else
      append(outcomes, { 'ok', int(remaining), snapshot(name, r) })
    end
  end
  return outcomes
end

local function covers(prefix, name)
  if prefix == '' or name == prefix then return true end
  return string.sub(name, 1, #prefix + 1) == prefix .. '/'
end

function ops.list(prefix, after, limit)
  local page = { 'ok', redis.call('GET', P .. 'rev') or '0', '0' }
  local from = '[' .. prefix
  if after ~= '' then from = '(' .. after end
  local to = prefix == '' and '+' or '[' .. prefix .. '/\255'
  local num = 0
  while true do
    local names = redis.call('ZRANGEBYLEX', P .. 'names', from, to, 'LIMIT', 0, 256)
    for _, name in ipairs(names) do
      if covers(prefix, name) then
        if num == tonumber(limit) then
          page[3] = '1'
          return page
        end
        num = num + 1
        append(page, int(left(name) or 0), snapshot(name, row(name)))
      end
    end
    if #names < 256 then return page end
    from = '(' .. names[#names]
  end
end

function ops.events(from, limit)
  local newest = redis.call('GET', P .. 'rev') or '0'
  if from == newest then return { 'ok' } end
  local oldest = redis.call('XRANGE', P .. 'log', '-', '+', 'COUNT', 1)[1]
  local first = oldest and string.match(oldest[1], '^(%d+)') or newest
  local events = { 'ok' }
  -- From before what is remembered (the one after `from` is missing), or from ahead of everything.
  if less(newest, from) or less(from, int(tonumber(first) - 1)) then
    append(events, newest, 'gap')
    return events
  end
  for _, entry in ipairs(redis.call('XRANGE', P .. 'log', '(' .. from .. '-0', '+', 'COUNT', limit)) do
    local e = {}
    for i = 1, #entry[2], 2 do e[entry[2][i]] = entry[2][i + 1] end
    append(events, string.match(entry[1], '^(%d+)'), e.k)
    if e.k == 'put' then
      append(events, e.n, e.f, e.v, e.i, e.b)
    else
      append(events, e.n, e.f or e.v)
    end
  end
  return events
end

function ops.ack(name, reader, fence, version, ttl, limit)
  local r = row(name)
  if not r or r.released then return { 'notfound' } end
  if less(r.fence, fence) or (fence == r.fence and less(r.version, version)) then
    return { 'conflict', r.version }
  end
  local key = P .. 'readers:' .. name
  local alive, readers = 0, redis.call('HGETALL', key)
  for i = 1, #readers, 2 do
    local f, v, _, deadline = string.match(readers[i + 1], '(%d+) (%d+) (%d+) (%d+)')
    if tonumber(deadline) <= now and readers[i] ~= reader then
      redis.call('HDEL', key, readers[i])
    elseif readers[i] == reader then
      -- An ack that was overtaken by a newer one takes nothing back.
      if less(fence, f) or (fence == f and less(version, v)) then fence, version = f, v end
    else
      alive = alive + 1
    end
  end
  if alive + 1 > tonumber(limit) then return { 'readers', int(alive + 1) } end
  redis.call('HSET', key, reader, fence .. ' ' .. version .. ' ' .. ttl .. ' ' .. int(now + ttl))
  return { 'ok' }
end

function ops.readers(name)
  if not row(name) then return { 'notfound' } end
  local answer, readers = { 'ok' }, redis.call('HGETALL', P .. 'readers:' .. name)
  for i = 1, #readers, 2 do
    local f, v, _, deadline = string.match(readers[i + 1], '(%d+) (%d+) (%d+) (%d+)')
    if tonumber(deadline) > now then append(answer, readers[i], f, v, int(deadline - now)) end
  end
  return answer
end

function ops.readcell(name)
  local cell = redis.call('HMGET', P .. 'cell:' .. name, 'v', 'b')
  if not cell[1] then return { 'notfound' } end
  return { 'ok', cell[1], cell[2] }
end

function ops.swapcell(name, expect, value, limit)
  local current = redis.call('HGET', P .. 'cell:' .. name, 'v') or '0'
  if expect ~= current then return { 'conflict', current } end
  if current == '0' and redis.call('INCR', P .. 'cells') > tonumber(limit) then
    return { 'names', int(redis.call('DECR', P .. 'cells') + 1) }
  end
  redis.call('HINCRBY', P .. 'cell:' .. name, 'v', 1)
  redis.call('HSET', P .. 'cell:' .. name, 'b', value)
  local version = redis.call('HGET', P .. 'cell:' .. name, 'v')
  log('k', 'cell', 'n', name, 'v', version)
  return { 'ok', version }
end

function ops.health()
  local up = redis.call('GET', P .. 'up')
  local rev = redis.call('GET', P .. 'rev') or '0'
  return { 'ok', int(now - up), rev, int(redis.call('ZCARD', P .. 'names')) }
end

rearm()
expire()
return ops[op](unpack(ARGV, 2))
