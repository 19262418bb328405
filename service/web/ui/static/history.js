// What the samples of one model add up to: rates over time, and the last batches.

const KEPT_S = 120;
export const KEPT_BATCHES = 512;
const LONGEST_GAP_S = 5;

export class History {
  constructor() {
    this.points = [];
    this.batches = new Map();
    this.last = null;
  }

  /** Take a sample of the model, made `at` seconds. */
  add(at, sample) {
    if (this.last !== null && at <= this.last.at) return;
    const before = this.last;
    this.last = { at, ...sample };
    if (sample.batches === undefined) return;
    if (before?.batches === undefined || sample.batches < before.batches || sample.succeeded < before.succeeded) {
      this.batches.clear(); // another process, which counts anew
    } else if (at - before.at < LONGEST_GAP_S) {
      const seconds = at - before.at;
      this.points.push({
        at,
        succeeded: (sample.succeeded - before.succeeded) / seconds,
        failed: (sample.failed + sample.expired - before.failed - before.expired) / seconds,
        busy:
          sample.open_s > before.open_s ? (sample.predict_s - before.predict_s) / (sample.open_s - before.open_s) : 0,
        interactive: sample.queued.interactive,
        bulk: sample.queued.bulk,
      });
    }
    while (this.points.length > 0 && this.points[0].at < at - KEPT_S) this.points.shift();
    for (const batch of sample.recent) if (!this.batches.has(batch.number)) this.batches.set(batch.number, batch);
    for (const number of this.batches.keys()) {
      if (this.batches.size <= KEPT_BATCHES) break;
      this.batches.delete(number);
    }
  }

  /** The mean of the last rates; null before there are any. */
  rate(name, points = 3) {
    const last = this.points.slice(-points);
    return last.length === 0 ? null : last.reduce((sum, point) => sum + point[name], 0) / last.length;
  }

  /** The batches that are kept, the newest last. */
  recent() {
    return [...this.batches.values()];
  }
}
