// consumer.mjs - keeps a copy of an entity's rows, with amqplib
//
//     node consumer.mjs URI QUEUE [--idle SECONDS] [--fail-once]
//
// An example to start from: manual acks, nack when processing failed, repeats
// recognised by their message id, nothing older written over something newer, keys
// that change, TRUNCATE, messages that can never be processed, and a connection that
// is lost.  The copy is in memory here.  A service has it in its database, and writes
// what it has seen and what came of it in one transaction, before the ack.  SIGTERM
// ends it.

import nodeProcess from 'node:process'
import { parseArgs } from 'node:util'
import amqplib from 'amqplib'

const PREFETCH = 100
const RECONNECT = 1000 // ms

const { values: options, positionals: [uri, queue] } = parseArgs({
  allowPositionals: true,
  options: { idle: { type: 'string' }, 'fail-once': { type: 'boolean' } }
})

const inbox = new Set() // message ids
const entity = new Map() // key -> { sequence, row }, row null if it was deleted
let truncated = 0 // sequence of the newest TRUNCATE
const bad = [] // what somebody has to look at
const failed = new Set()
const counts = { processed: 0, repeats: 0, failed: 0, bad: 0 }

// A message that fails in the same way whenever it comes.
class BadMessage extends Error {}

// JSON.parse() rounds bigint and numeric beyond 2^53 (and 15 digits): a number that
// a double does not hold as it stands becomes a string.
function parseExactly (text) {
  const exact = text.replace(/("(?:[^"\\]|\\.)*")|(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)/g,
    (match, string, number) => string ?? (String(Number(number)) === number ? number : `"${number}"`))
  try {
    return JSON.parse(exact)
  } catch (error) {
    throw new BadMessage(error.message)
  }
}

// Of a deleted row the sequence stays, so that no late message revives it.
function write (key, sequence, row) {
  const known = entity.get(key)?.sequence ?? truncated
  if (known < sequence) entity.set(key, { sequence, row })
}

function truncate (sequence) {
  truncated = Math.max(truncated, sequence)
  for (const [key, { sequence: known }] of entity) {
    if (known < sequence) entity.delete(key)
  }
}

// What has no op is no change of a row, but somebody's publish().
function apply ({ op, key, old_key: oldKey, sequence }, content) {
  if (op === undefined) return
  if (op === 't') return truncate(sequence)
  if (key === undefined || sequence === undefined) throw new BadMessage('a change without key or sequence')
  const { after } = parseExactly(content.toString())
  if (oldKey !== undefined) write(oldKey, sequence, null) // the row has left that key
  write(key, sequence, after)
}

// Returns what it was.
function process ({ content, properties: { messageId, headers } }) {
  if (inbox.has(messageId)) return 'repeats'
  apply(headers ?? {}, content)
  inbox.add(messageId)
  return 'processed'
}

function processOrPutAside (message) {
  try {
    return process(message)
  } catch (error) {
    if (!(error instanceof BadMessage)) throw error
    bad.push({ reason: error.message, message })
    return 'bad'
  }
}

function handle (channel, message) {
  let result
  try {
    if (options['fail-once'] && !failed.has(message.properties.messageId)) {
      failed.add(message.properties.messageId)
      throw new Error('on purpose')
    }
    result = processOrPutAside(message)
  } catch {
    // a real service waits before it gives a message back
    counts.failed++
    return channel.nack(message, false, true)
  }
  counts[result]++
  channel.ack(message)
}

let connection
let ended = false
let idle

function restartIdleTimer () {
  if (options.idle === undefined) return
  clearTimeout(idle)
  idle = setTimeout(finish, options.idle * 1000)
}

async function finish () {
  ended = true
  clearTimeout(idle)
  await connection?.close().catch(() => {})
  const rows = [...entity].map(([key, { row }]) => [key, row])
  console.log(JSON.stringify({ ...counts, rows: Object.fromEntries(rows) }))
}

function reconnect (error) {
  if (error) console.error(error.message)
  if (!ended) setTimeout(connect, RECONNECT)
}

// What was not acked when a connection was lost comes again.
async function connect () {
  try {
    connection = await amqplib.connect(uri)
  } catch (error) {
    return reconnect(error)
  }
  connection.on('error', () => {}) // 'close' follows
  connection.on('close', reconnect)
  try {
    const channel = await connection.createChannel()
    channel.on('error', () => connection.close().catch(() => {}))
    await channel.prefetch(PREFETCH)
    await channel.consume(queue, message => {
      // null: the queue was deleted
      if (message === null) return finish()
      restartIdleTimer()
      handle(channel, message)
    })
    restartIdleTimer()
  } catch {
    connection.close().catch(() => {})
  }
}

nodeProcess.on('SIGTERM', finish)
await connect()
