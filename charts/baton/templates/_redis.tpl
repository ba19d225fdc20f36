{{/* A Redis for trials: a StatefulSet of one, and its Service.
     (dict "root" $ "component" "redis" "redis" <values> "password" <entry>) */}}
{{- define "baton.redis" -}}
{{- $root := .root -}}
{{- $labels := dict "root" .root "component" .component -}}
{{- $name := printf "%s-%s" (include "baton.fullname" .root) .component -}}
{{- $keep := .redis.persistence.enabled -}}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $name }}
  namespace: {{ $root.Release.Namespace | quote }}
  labels: {{- include "baton.labels" $labels | nindent 4 }}
spec:
  serviceName: {{ $name }}
  replicas: 1
  selector:
    matchLabels: {{- include "baton.selectorLabels" $labels | nindent 6 }}
  template:
    metadata:
      labels: {{- include "baton.podLabels" $labels | nindent 8 }}
      annotations:
        checksum/secrets: {{ toJson .password | sha256sum }}
    spec:
      {{- include "baton.podBasics" (dict "root" $root "part" dict "for" "redis") | nindent 6 }}
      terminationGracePeriodSeconds: 30
      containers:
        - name: redis
          image: {{ include "baton.redisImage" $root }}
          imagePullPolicy: {{ $root.Values.images.pullPolicy }}
          # The password goes into a file: a command line is for everybody to read.
          command: [sh, -c]
          args:
            - >-
              umask 077;
              printf 'requirepass %s\n' "$REDISCLI_AUTH" > /tmp/redis.conf;
              exec redis-server /tmp/redis.conf --dir /data --save "" --appendonly {{ ternary "yes" "no" $keep }}
          ports:
            - {name: redis, containerPort: 6379}
          env:
            {{- include "baton.secretEnv" (dict "root" $root "name" "REDISCLI_AUTH" "entry" .password) | nindent 12 }}
          livenessProbe:
            exec: {command: [sh, -c, redis-cli ping | grep -q PONG]}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          readinessProbe:
            exec: {command: [sh, -c, redis-cli ping | grep -q PONG]}
            periodSeconds: 3
            timeoutSeconds: 3
          securityContext: {{- toYaml (default (dict) $root.Values.securityContext) | nindent 12 }}
          resources: {{- include "baton.resources" .redis.resources | nindent 12 }}
          volumeMounts:
            - {name: data, mountPath: /data}
            - {name: tmp, mountPath: /tmp}
      volumes:
        - name: tmp
          emptyDir: {}
        {{- if not $keep }}
        - name: data
          emptyDir: {}
        {{- end }}
  {{- if $keep }}
  volumeClaimTemplates:
    - metadata:
        name: data
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .redis.persistence.storageClass }}
        storageClassName: {{ . | quote }}
        {{- end }}
        resources:
          requests: {storage: {{ include "baton.quantityText" .redis.persistence.size | quote }}}
  {{- end }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  namespace: {{ $root.Release.Namespace | quote }}
  labels: {{- include "baton.labels" $labels | nindent 4 }}
spec:
  type: ClusterIP
  selector: {{- include "baton.selectorLabels" $labels | nindent 4 }}
  ports:
    - {name: redis, port: 6379, targetPort: redis, protocol: TCP}
{{- end -}}

{{- define "baton.rayRedisAddress" -}}
{{- default (printf "redis://%s-ray-redis:6379" (include "baton.fullname" .)) .Values.rayRedis.address -}}
{{- end -}}

{{/* Where the password of Ray's Redis is; the embedded one always has one. */}}
{{- define "baton.rayRedisPassword" -}}
{{- $password := .Values.rayRedis.password -}}
{{- if or .Values.rayRedis.embedded.enabled $password.value $password.existingSecret -}}
valueFrom:
  secretKeyRef:
    name: {{ default (include "baton.secretName" .) $password.existingSecret | quote }}
    key: {{ $password.key | quote }}
{{- end -}}
{{- end -}}
