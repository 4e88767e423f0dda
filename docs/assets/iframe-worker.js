/* Search from a folder: browsers refuse a Worker on file: pages, so there the script runs in a hidden frame instead.
   It has what the search of the theme uses of a Worker: postMessage, events, terminate, and importScripts inside. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      const load = source => new Promise((resolve, reject) => {
        const script = inside.document.createElement("script");
        Object.assign(script, { src: source, onload: resolve, onerror: reject });
        inside.document.head.append(script);
      });
      inside.importScripts = (...sources) =>
        sources.reduce((done, source) => done.then(() => load(new URL(source, url))), Promise.resolve());
      inside.postMessage = data => this.deliver(this, data);
      load(url).then(() => {
        this.send = data => this.deliver(inside, data);
        this.waiting.forEach(this.send);
      }, () => this.dispatchEvent(new ErrorEvent("error", { message: `cannot load ${url}` })));
    }

    deliver(target, data) {
      setTimeout(() => {
        const event = new MessageEvent("message", { data });
        target.dispatchEvent(event);
        if (typeof target.onmessage === "function" && target === this) target.onmessage(event);
      });
    }

    postMessage(data) {
      if (this.send) this.send(data);
      else this.waiting.push(data);
    }

    terminate() { this.frame.remove(); }
  };
}
