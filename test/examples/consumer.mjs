// consumer.mjs - keeps a copy of an entity's rows, with amqplib
//
//     node consumer.mjs URI QUEUE [--idle SECONDS] [--fail-once]
//
// An example to start from: manual acks, nack when processing failed, repeats
// recognised by their message id, nothing older written over something newer.
// The copy is in memory here.  A service has it in its database, and writes
// what it has seen and what came of it in one transaction, before the ack.

import { parseArgs } from 'node:util'
import amqplib from 'amqplib'

const PREFETCH = 100

const { values: options, positionals: [uri, queue] } = parseArgs({
  allowPositionals: true,
  options: { idle: { type: 'string' }, 'fail-once': { type: 'boolean' } }
})

const inbox = new Set() // message ids
const entity = new Map() // key -> { sequence, row }, row null if it was deleted
const failed = new Set()
const counts = { processed: 0, repeats: 0, failed: 0 }

// Returns false if it was a repeat.
function process (message) {
  const { messageId, headers } = message.properties
  if (inbox.has(messageId)) return false
  const body = JSON.parse(message.content)
  // sequences fit a double up to 2^53
  const known = entity.get(headers.key)
  if (!known || known.sequence < headers.sequence) {
    entity.set(headers.key, { sequence: headers.sequence, row: body.after })
  }
  inbox.add(messageId)
  return true
}

function handle (channel, message) {
  try {
    if (options['fail-once'] && !failed.has(message.properties.messageId)) {
      failed.add(message.properties.messageId)
      throw new Error('on purpose')
    }
    counts[process(message) ? 'processed' : 'repeats']++
    channel.ack(message)
  } catch {
    // a real service waits before it gives a message back
    counts.failed++
    channel.nack(message, false, true)
  }
}

const connection = await amqplib.connect(uri)
const channel = await connection.createChannel()
await channel.prefetch(PREFETCH)

let idle
function restartIdleTimer () {
  if (options.idle === undefined) return
  clearTimeout(idle)
  idle = setTimeout(finish, options.idle * 1000)
}

async function finish () {
  await connection.close()
  const rows = [...entity].map(([key, { row }]) => [key, row])
  console.log(JSON.stringify({ ...counts, rows: Object.fromEntries(rows) }))
}

await channel.consume(queue, message => {
  // null: the queue was deleted
  if (message === null) return finish()
  restartIdleTimer()
  handle(channel, message)
})
restartIdleTimer()
