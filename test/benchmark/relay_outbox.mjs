// relay_outbox - the npm package pg-transactional-outbox, publishing with amqplib
//
//     relay_outbox.mjs DSN PORT EXCHANGE SECONDS COUNT
//     relay_outbox.mjs setup        prints the SQL of its table and function
//
// Its polling listener, which marks each message in a transaction of its own.
// Ends when COUNT are confirmed or SECONDS have passed; with 0 it goes on.

import amqp from 'amqplib'
import { DatabaseSetup, getDisabledLogger, initializePollingMessageListener } from 'pg-transactional-outbox'
import { createInterface } from 'node:readline/promises'

const BATCH = 100

const table = { outboxOrInbox: 'outbox', schema: 'public', table: 'outbox', nextMessagesName: 'next_outbox_messages' }
if (process.argv[2] === 'setup') {
  console.log(DatabaseSetup.dropAndCreateTable(table))
  console.log(DatabaseSetup.createPollingFunction(table))
  console.log(DatabaseSetup.setupPollingIndexes(table))
  process.exit()
}

const [dsn, port, exchange, seconds, wanted] = process.argv.slice(2)
const connection = await amqp.connect(`amqp://guest:guest@127.0.0.1:${port}/%2F`)
const channel = await connection.createConfirmChannel()
let count = 0

function finish() {
  console.log('done')
  console.log(count)
  process.exit()
}

function publish(message) {
  return new Promise((resolve, reject) => {
    channel.publish(exchange, '', Buffer.from(JSON.stringify(message.payload)), {
      contentType: 'application/json',
      persistent: true,
      mandatory: true,
      messageId: message.id,
      type: message.messageType,
      timestamp: Math.floor(Date.parse(message.createdAt) / 1000),
      appId: 'relay',
      headers: { sequence: 0, key: message.aggregateId },
    }, error => (error ? reject(error) : resolve()))
  })
}

async function handle(message) {
  await publish(message)
  count += 1
  if (count === Number(wanted)) finish()
}

const input = createInterface({ input: process.stdin })
console.log('ready')
await new Promise(resolve => input.once('line', resolve))

if (Number(seconds) > 0) setTimeout(finish, seconds * 1000)
const { pathname, hostname, port: dbPort, username } = new URL(dsn)
initializePollingMessageListener({
  outboxOrInbox: 'outbox',
  dbListenerConfig: { host: hostname, port: Number(dbPort), user: username, database: pathname.slice(1), max: 20 },
  settings: {
    dbSchema: 'public',
    dbTable: 'outbox',
    enableMaxAttemptsProtection: false,
    enablePoisonousMessageProtection: false,
    nextMessagesBatchSize: BATCH,
    nextMessagesFunctionName: 'next_outbox_messages',
    nextMessagesPollingIntervalInMs: 100,
  },
}, { handle }, getDisabledLogger(), { batchSizeStrategy: async () => BATCH })
