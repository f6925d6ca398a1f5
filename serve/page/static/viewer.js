// A radiograph in a canvas: window and level by drag, zoom at the pointer, a heatmap on top.
//
// The film comes with 8 bits; the window is applied to its grey values through a table, so that heat is never windowed.

const GREYS = 256;
const WHOLE = { width: 256, level: 128 };
const MOST_ZOOM = 16;
const STEP = 8;

export class Viewer {
  constructor(element, canvas, onChange) {
    this.element = element;
    this.canvas = canvas;
    this.onChange = onChange;
    this.context = canvas.getContext("2d");
    this.windowed = document.createElement("canvas");
    this.window = { ...WHOLE };
    this.place = { zoom: 1, x: 0, y: 0 };
    this.inverted = false;
    this.heat = null;
    this.opacity = 0.8;
    this.pointers = new Map();
    this.spaceHeld = false;
    new ResizeObserver(() => this.draw()).observe(element);
    this.listen();
  }

  show(film) {
    const { width, height } = film;
    Object.assign(this.windowed, { width, height });
    this.element.style.setProperty("--ratio", `${width} / ${height}`);
    const context = this.windowed.getContext("2d", { willReadFrequently: true });
    context.drawImage(film, 0, 0);
    this.pixels = context.getImageData(0, 0, width, height);
    this.greys = Uint8Array.from({ length: width * height }, (_, index) => this.pixels.data[4 * index]);
    this.applyWindow();
  }

  showHeat(picture) {
    this.heat = picture;
    this.draw();
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    this.draw();
  }

  setWindow(width, level) {
    this.window = { width: clamp(width, 2, 2 * GREYS), level: clamp(level, -GREYS / 2, 1.5 * GREYS) };
    this.applyWindow();
  }

  invert() {
    this.inverted = !this.inverted;
    this.applyWindow();
  }

  reset() {
    this.window = { ...WHOLE };
    this.place = { zoom: 1, x: 0, y: 0 };
    this.inverted = false;
    this.applyWindow();
  }

  // `x` and `y` in CSS pixels from the middle of the viewer: what lies there stays there.
  zoomBy(factor, x = 0, y = 0) {
    const zoom = clamp(this.place.zoom * factor, 1, MOST_ZOOM);
    const ratio = zoom / this.place.zoom;
    this.moveTo(zoom, x - (x - this.place.x) * ratio, y - (y - this.place.y) * ratio);
  }

  moveBy(x, y) {
    this.moveTo(this.place.zoom, this.place.x + x, this.place.y + y);
  }

  moveTo(zoom, x, y) {
    const { clientWidth, clientHeight } = this.element;
    const [mostX, mostY] = [(clientWidth * (zoom - 1)) / 2, (clientHeight * (zoom - 1)) / 2];
    this.place = { zoom, x: clamp(x, -mostX, mostX), y: clamp(y, -mostY, mostY) };
    this.draw();
  }

  applyWindow() {
    if (!this.greys) return;
    const { width, level } = this.window;
    const table = new Uint8ClampedArray(GREYS);
    for (let grey = 0; grey < GREYS; grey += 1) {
      const shown = ((grey - level + width / 2) / width) * (GREYS - 1);
      table[grey] = this.inverted ? GREYS - 1 - clamp(shown, 0, GREYS - 1) : shown;
    }
    const { data } = this.pixels;
    this.greys.forEach((grey, index) => {
      data[4 * index] = data[4 * index + 1] = data[4 * index + 2] = table[grey];
    });
    this.windowed.getContext("2d").putImageData(this.pixels, 0, 0);
    this.draw();
  }

  draw() {
    // A session that ended has taken it off the page.
    if (!this.element.isConnected) return;
    this.onChange(this);
    if (!this.greys) return;
    const { clientWidth, clientHeight } = this.element;
    const density = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(clientWidth * density), Math.round(clientHeight * density)];
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const { context, windowed, place } = this;
    const scale = Math.min(width / windowed.width, height / windowed.height) * place.zoom;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    context.setTransform(scale, 0, 0, scale, width / 2 + place.x * density, height / 2 + place.y * density);
    context.imageSmoothingQuality = "high";
    context.translate(-windowed.width / 2, -windowed.height / 2);
    context.globalAlpha = 1;
    context.drawImage(windowed, 0, 0);
    if (this.heat) {
      context.globalAlpha = this.opacity;
      context.drawImage(this.heat, 0, 0, windowed.width, windowed.height);
    }
  }

  listen() {
    const { element } = this;
    element.addEventListener("pointerdown", (event) => this.press(event));
    element.addEventListener("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointercancel"]) {
      element.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
    element.addEventListener("dblclick", () => this.reset());
    element.addEventListener("contextmenu", (event) => event.preventDefault());
    element.addEventListener("wheel", (event) => this.turn(event), { passive: false });
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("keyup", (event) => {
      if (event.key === " ") this.spaceHeld = false;
    });
    element.addEventListener("blur", () => {
      this.spaceHeld = false;
    });
  }

  press(event) {
    this.element.focus({ preventScroll: true });
    this.element.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (event.button === 1) event.preventDefault();
  }

  drag(event) {
    const last = this.pointers.get(event.pointerId);
    if (!last) return;
    const [x, y] = [event.clientX - last.x, event.clientY - last.y];
    if (this.pointers.size === 2) {
      this.pinch(event, last);
    } else if (this.spaceHeld || event.buttons !== 1) {
      this.moveBy(x, y);
    } else {
      const greys = GREYS / this.element.clientWidth;
      this.setWindow(this.window.width + x * greys, this.window.level + y * greys);
    }
    Object.assign(last, { x: event.clientX, y: event.clientY });
  }

  pinch(event, last) {
    const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
    const before = Math.hypot(last.x - other.x, last.y - other.y);
    const after = Math.hypot(event.clientX - other.x, event.clientY - other.y);
    this.moveBy((event.clientX - last.x) / 2, (event.clientY - last.y) / 2);
    if (before > 0) this.zoomBy(after / before, ...this.fromMiddle((event.clientX + other.x) / 2, (event.clientY + other.y) / 2));
  }

  turn(event) {
    event.preventDefault();
    this.zoomBy(Math.exp(-event.deltaY / 500), ...this.fromMiddle(event.clientX, event.clientY));
  }

  fromMiddle(x, y) {
    const box = this.element.getBoundingClientRect();
    return [x - box.x - box.width / 2, y - box.y - box.height / 2];
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { width, level } = this.window;
    const move = 5 * STEP;
    const keys = event.shiftKey
      ? {
          ArrowLeft: () => this.moveBy(move, 0),
          ArrowRight: () => this.moveBy(-move, 0),
          ArrowUp: () => this.moveBy(0, move),
          ArrowDown: () => this.moveBy(0, -move),
        }
      : {
          ArrowLeft: () => this.setWindow(width - STEP, level),
          ArrowRight: () => this.setWindow(width + STEP, level),
          ArrowUp: () => this.setWindow(width, level - STEP),
          ArrowDown: () => this.setWindow(width, level + STEP),
        };
    Object.assign(keys, {
      "+": () => this.zoomBy(1.25),
      "=": () => this.zoomBy(1.25),
      "-": () => this.zoomBy(0.8),
      i: () => this.invert(),
      r: () => this.reset(),
      " ": () => {
        this.spaceHeld = true;
      },
    });
    const wanted = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!wanted) return;
    event.preventDefault();
    wanted();
  }
}

function clamp(value, least, most) {
  return Math.min(Math.max(value, least), most);
}
